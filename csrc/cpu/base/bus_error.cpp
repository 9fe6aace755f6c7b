// A mapped file that is cut, or whose disk fails, ends the process by SIGBUS; here it says first which file it was.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <mutex>

#include "dbrxq.h"

namespace {

struct sigaction previous;

void say(const char* text) {
  if (write(STDERR_FILENO, text, strlen(text)) < 0) return;  // nobody is left to be told
}

// The file that is mapped at an address, from the lines "BEGIN-END MODE OFFSET DEVICE INODE   PATH" of /proc/self/maps;
// false where that is not known. Uses only what a signal handler may.
bool mapped_file(uintptr_t address, char* path, size_t room) {
  const int file = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  char buffer[4096];
  uintptr_t bounds[2] = {0, 0};
  int field = 0;  // 0, 1: bounds; 2 to 5: mode, offset, device, inode; 6: path
  size_t length = 0;
  bool found = false;
  for (ssize_t count; !found && (count = read(file, buffer, sizeof buffer)) > 0;) {
    for (ssize_t i = 0; i < count && !found; i++) {
      const char c = buffer[i];
      if (c == '\n') {
        found = length > 0 && bounds[0] <= address && address < bounds[1];
        if (found) break;
        bounds[0] = bounds[1] = 0;
        field = 0;
        length = 0;
      } else if (field < 2) {
        if (c == '-' || c == ' ') {
          field++;
        } else {
          bounds[field] = bounds[field] * 16 + static_cast<uintptr_t>(c <= '9' ? c - '0' : c - 'a' + 10);
        }
      } else if (field < 6) {
        field += c == ' ';
      } else if ((c != ' ' || length > 0) && length + 1 < room) {
        path[length++] = c;
      }
    }
  }
  close(file);
  path[length] = 0;
  return found;
}

void on_bus_error(int number, siginfo_t* info, void*) {
  const bool ours = info->si_code == BUS_ADRERR;
  if (ours) {
    static char path[4096];
    const bool known = mapped_file(reinterpret_cast<uintptr_t>(info->si_addr), path, sizeof path);
    say("dbrx-quant: error: ");
    say(known ? path : "a mapped file");
    say(": was cut, or cannot be read any more, while it was in use; put it back and start again\n");
  }
  const bool chained = (previous.sa_flags & SA_SIGINFO) ||
                       (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN);
  if (ours && !chained) _exit(1);
  sigaction(number, &previous, nullptr);  // on return the access is repeated, and whoever was there before sees it
}

}  // namespace

void dbrxq_explain_bus_errors(void) {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous);
  });
}

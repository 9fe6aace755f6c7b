/* Preloaded into a process, makes its n-th call of one kind fail below one folder, as a broken disk would.
 *
 *   FAULTS_ROOT   only calls on paths that begin so; without it all calls pass
 *   FAULTS_OP     which kind: open, write, read, fsync, rename, mkdir, unlink, truncate, map
 *   FAULTS_AT     the number of the call that fails, from 1; 0: none
 *   FAULTS_ERRNO  the error; 0: a write or read does half of what it was asked for
 *   FAULTS_STAYS  if set, all later calls of that kind fail, too
 *   FAULTS_LOG    a file that gets a letter for every call, a for the first kind of the list
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *const kinds[] = {"open", "write", "read", "fsync", "rename", "mkdir", "unlink", "truncate", "map"};
enum kind { OPEN, WRITE, READ, FSYNC, RENAME, MKDIR, UNLINK, TRUNCATE, MAP };
enum verdict { PASS, FAIL, HALF };

static long calls; /* of the chosen kind below the root */

static void note(enum kind kind) {
  const char *log = getenv("FAULTS_LOG");
  if (!log) return;
  int fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
  if (fd < 0) return;
  char letter = (char)('a' + kind);
  (void)!syscall(SYS_write, fd, &letter, 1);
  syscall(SYS_close, fd);
}

static enum verdict judge(enum kind kind, int fd, const char *path) {
  const char *root = getenv("FAULTS_ROOT"), *chosen = getenv("FAULTS_OP"), *at = getenv("FAULTS_AT");
  if (!root) return PASS;
  char link[64], target[4096];
  if (!path) {
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, target, sizeof target - 1);
    if (length <= 0) return PASS;
    target[length] = 0;
    path = target;
  }
  if (strncmp(path, root, strlen(root)) != 0) return PASS;
  int kept = errno;
  note(kind);
  errno = kept;
  if (!chosen || strcmp(chosen, kinds[kind]) != 0) return PASS;
  long wanted = at ? atol(at) : 0, now = __sync_add_and_fetch(&calls, 1);
  if (!wanted || now < wanted || (now > wanted && !getenv("FAULTS_STAYS"))) return PASS;
  const char *error = getenv("FAULTS_ERRNO");
  int number = error ? atoi(error) : EIO;
  if (!number) return HALF;
  errno = number;
  return FAIL;
}

#define REAL(name)                  \
  static __typeof__(&name) real;    \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))

#define OPENS(name, head, tail)                                           \
  int name head {                                                         \
    REAL(name);                                                           \
    va_list rest;                                                         \
    va_start(rest, flags);                                                \
    mode_t mode = va_arg(rest, mode_t);                                   \
    va_end(rest);                                                         \
    if (WRITES(flags) && judge(OPEN, -1, path) != PASS) return -1;        \
    return real tail;                                                     \
  }
OPENS(open, (const char *path, int flags, ...), (path, flags, mode))
OPENS(open64, (const char *path, int flags, ...), (path, flags, mode))
OPENS(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
OPENS(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))

#define TRANSFERS(name, kind, head, tail_of_half, tail)                   \
  ssize_t name head {                                                     \
    REAL(name);                                                           \
    switch (judge(kind, fd, NULL)) {                                      \
      case FAIL: return -1;                                               \
      case HALF: return real tail_of_half;                                \
      default: return real tail;                                          \
    }                                                                     \
  }
#define LESS(n) ((n) > 1 ? (n) / 2 : (n))
TRANSFERS(write, WRITE, (int fd, const void *data, size_t n), (fd, data, LESS(n)), (fd, data, n))
TRANSFERS(pwrite, WRITE, (int fd, const void *data, size_t n, off_t at), (fd, data, LESS(n), at), (fd, data, n, at))
TRANSFERS(pwrite64, WRITE, (int fd, const void *data, size_t n, off64_t at), (fd, data, LESS(n), at), (fd, data, n, at))
TRANSFERS(writev, WRITE, (int fd, const struct iovec *parts, int n), (fd, parts, LESS(n)), (fd, parts, n))
TRANSFERS(read, READ, (int fd, void *data, size_t n), (fd, data, LESS(n)), (fd, data, n))
TRANSFERS(pread, READ, (int fd, void *data, size_t n, off_t at), (fd, data, LESS(n), at), (fd, data, n, at))
TRANSFERS(pread64, READ, (int fd, void *data, size_t n, off64_t at), (fd, data, LESS(n), at), (fd, data, n, at))
TRANSFERS(sendfile, WRITE, (int fd, int from, off_t *at, size_t n), (fd, from, at, LESS(n)), (fd, from, at, n))
TRANSFERS(sendfile64, WRITE, (int fd, int from, off64_t *at, size_t n), (fd, from, at, LESS(n)), (fd, from, at, n))

#define ANSWERS(name, kind, fd, path, head, tail)                         \
  int name head {                                                         \
    REAL(name);                                                           \
    return judge(kind, fd, path) == PASS ? real tail : -1;                \
  }
ANSWERS(fsync, FSYNC, fd, NULL, (int fd), (fd))
ANSWERS(fdatasync, FSYNC, fd, NULL, (int fd), (fd))
ANSWERS(rename, RENAME, -1, from, (const char *from, const char *to), (from, to))
ANSWERS(renameat, RENAME, -1, from, (int a, const char *from, int b, const char *to), (a, from, b, to))
ANSWERS(mkdir, MKDIR, -1, path, (const char *path, mode_t mode), (path, mode))
ANSWERS(unlink, UNLINK, -1, path, (const char *path), (path))
ANSWERS(ftruncate, TRUNCATE, fd, NULL, (int fd, off_t n), (fd, n))
ANSWERS(ftruncate64, TRUNCATE, fd, NULL, (int fd, off64_t n), (fd, n))

int posix_fallocate64(int fd, off64_t at, off64_t n) {
  REAL(posix_fallocate64);
  return judge(TRUNCATE, fd, NULL) == PASS ? real(fd, at, n) : errno;
}

int posix_fallocate(int fd, off_t at, off_t n) {
  REAL(posix_fallocate);
  return judge(TRUNCATE, fd, NULL) == PASS ? real(fd, at, n) : errno;
}

void *mmap64(void *address, size_t n, int rights, int flags, int fd, off64_t at) {
  REAL(mmap64);
  if (fd >= 0 && judge(MAP, fd, NULL) != PASS) return MAP_FAILED;
  return real(address, n, rights, flags, fd, at);
}

void *mmap(void *address, size_t n, int rights, int flags, int fd, off_t at) {
  REAL(mmap);
  if (fd >= 0 && judge(MAP, fd, NULL) != PASS) return MAP_FAILED;
  return real(address, n, rights, flags, fd, at);
}

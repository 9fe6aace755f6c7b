# For which GPUs the CUDA kernels are built, in the words of CMAKE_CUDA_ARCHITECTURES: "80-real" is machine code, "80" is
# that and PTX, from which a driver that is as new as the compiler translates for later GPUs.
#
#   DBRXQ_CUDA_ARCHITECTURES=86     these, whatever is here
#   DBRXQ_CUDA_ARCHITECTURES=all    every generation that the compiler knows, and PTX of the newest
#   not given                       the GPUs that nvidia-smi finds. Where there is none: all for a wheel, which goes
#                                   elsewhere, and for an editable build a draft of 80, which only shows that the
#                                   sources compile (a third of the time) and is refused on GPUs.

set(DBRXQ_ALL_GPUS 75 80 86 89 90 100 120)

function(dbrxq_cuda_targets result)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE listed ERROR_QUIET)
  string(REGEX MATCHALL "compute_[0-9]+" known "${listed}")
  list(TRANSFORM known REPLACE "compute_" "")
  if(NOT DBRXQ_CUDA_ARCHITECTURES STREQUAL "" AND NOT DBRXQ_CUDA_ARCHITECTURES STREQUAL "all")
    set(${result} ${DBRXQ_CUDA_ARCHITECTURES} PARENT_SCOPE)
    return()
  endif()
  if(DBRXQ_CUDA_ARCHITECTURES STREQUAL "")
    dbrxq_gpus_here(here)
    foreach(gpu ${here})
      if(gpu LESS 75)
        message(STATUS "dbrx-quant: a GPU of compute capability ${gpu} is too old for the CUDA kernels, from 75 on")
        list(REMOVE_ITEM here ${gpu})
      elseif(NOT gpu IN_LIST known)
        message(STATUS "dbrx-quant: ${CMAKE_CUDA_COMPILER} does not know the GPU here, of compute capability ${gpu}")
        set(here "")
        break()
      endif()
    endforeach()
    if(here)
      set(${result} ${here} PARENT_SCOPE)
      return()
    elseif(NOT "${SKBUILD_STATE}" STREQUAL "wheel")
      set(${result} 80 PARENT_SCOPE)
      set(DBRXQ_CUDA_DRAFT ON PARENT_SCOPE)
      return()
    endif()
  endif()
  set(all "")
  foreach(gpu ${DBRXQ_ALL_GPUS})
    if(gpu IN_LIST known)
      list(APPEND all ${gpu})
    endif()
  endforeach()
  list(POP_BACK all newest)
  list(TRANSFORM all APPEND "-real")
  set(${result} ${all} ${newest} PARENT_SCOPE)
endfunction()

# The compute capabilities of the GPUs of this machine, without a point, each once.
function(dbrxq_gpus_here result)
  set(found "")
  execute_process(
    COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE listed RESULT_VARIABLE failed ERROR_QUIET)
  if(NOT failed)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" found "${listed}")
    list(TRANSFORM found REPLACE "\\." "")
    list(REMOVE_DUPLICATES found)
  endif()
  set(${result} ${found} PARENT_SCOPE)
endfunction()

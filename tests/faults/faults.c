// Faults of a file system, put between a program and the C library by LD_PRELOAD. Linux.
//
// FAULT_UNDER: calls on files below this folder count, others pass. FAULT: which call fails, `name=k` for the k-th one (from 1):
//   fsync=k   fsync or fdatasync gives EIO
//   write=k   write writes half of what it is given, and the call after it gives ENOSPC
//   rename=k  rename gives EIO, and the old name stays
//   short=1   no fault: every write writes half of what it is given, as the system may do at any time
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static atomic_long calls;

static int is_under(const char* path) {
  const char* folder = getenv("FAULT_UNDER");
  return folder != NULL && strncmp(path, folder, strlen(folder)) == 0;
}

static int is_inside(int file) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return is_under(path);
}

// The number in FAULT, where that is of this kind; 0 otherwise.
static long asked(const char* kind) {
  const char* fault = getenv("FAULT");
  const size_t length = strlen(kind);
  if (fault == NULL || strncmp(fault, kind, length) != 0 || fault[length] != '=') return 0;
  return atol(fault + length + 1);
}

static int sync_of(const char* name, int file) {
  const long at = asked("fsync");
  if (at > 0 && is_inside(file) && atomic_fetch_add(&calls, 1) + 1 == at) {
    errno = EIO;
    return -1;
  }
  int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
  return real(file);
}

int fsync(int file) { return sync_of("fsync", file); }
int fdatasync(int file) { return sync_of("fdatasync", file); }

ssize_t write(int file, const void* bytes, size_t count) {
  static ssize_t (*real)(int, const void*, size_t);
  if (real == NULL) real = (ssize_t(*)(int, const void*, size_t))dlsym(RTLD_NEXT, "write");
  const long at = asked("write");
  if (at > 0 && is_inside(file)) {
    const long now = atomic_fetch_add(&calls, 1) + 1;
    if (now == at && count > 1) return real(file, bytes, count / 2);
    if (now == at + 1) {
      errno = ENOSPC;
      return -1;
    }
  }
  if (asked("short") > 0 && count > 1 && is_inside(file)) count /= 2;
  return real(file, bytes, count);
}

int rename(const char* from, const char* to) {
  int (*real)(const char*, const char*) = (int (*)(const char*, const char*))dlsym(RTLD_NEXT, "rename");
  const long at = asked("rename");
  if (at > 0 && is_under(to) && atomic_fetch_add(&calls, 1) + 1 == at) {
    errno = EIO;
    return -1;
  }
  return real(from, to);
}

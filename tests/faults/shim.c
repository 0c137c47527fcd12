/* Stands between a process and the C library: fails, tears or records what it writes, and shifts its clock.
 *
 * Loaded by LD_PRELOAD into the process under test, and all that it forks. Its orders are in a control page, a file
 * mapped into memory and named by FAULTS_CONTROL, which shim.py lays out in the same way: orders may change at any
 * moment, and the count of calls is there when the process has been killed. Only calls that touch files below one
 * folder count, and only those that can change what is on the disk.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define CALLS 16384
#define PATH 1024
#define MAGIC 0xae15417u

enum op { OPEN, CREATE, WRITE, TRUNCATE, ALLOCATE, FSYNC, RENAME, LINK, UNLINK };
enum mode { NOTHING, ERROR_ONCE, ERROR_FOR_EVER, TORN_KILL, TORN_ERROR, KILL_BEFORE, KILL_AFTER };
enum order { GO, FAIL, HALF_THEN_DIE, HALF_THEN_FAIL, GO_THEN_DIE };

struct call {
    uint32_t op, phase;
    int64_t offset, length;
    char path[104]; /* its end, where it is longer */
};

struct control {
    uint32_t magic, mode;
    uint64_t at;           /* the call that fails, from 1; 0 for none */
    int32_t error;         /* the errno of a failure */
    uint32_t phase;        /* what the process says that it is doing; copied into each call */
    uint32_t kinds;        /* what fails for ever, as bits of enum op */
    uint32_t recording;    /* 1 while calls are written to the log */
    uint64_t count;        /* calls so far */
    uint64_t struck;       /* of which failed, or killed */
    int64_t wall_ns, boot_ns; /* what the clocks are shifted by */
    char folder[PATH], log[PATH];
    struct call calls[CALLS];
};

/* One record of the log; path, second path and data follow. */
struct record {
    uint32_t op, path, second, reserved;
    uint64_t file; /* its inode */
    int64_t offset, data;
};

static struct control *control;
static pthread_mutex_t recording = PTHREAD_MUTEX_INITIALIZER;
static int log_fd = -1;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) {
        fprintf(stderr, "shim: there is no %s\n", name);
        abort();
    }
    return found;
}

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("FAULTS_CONTROL");
    if (!name) return;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, name, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    struct control *page = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (page != MAP_FAILED && page->magic == MAGIC) control = page;
}

/* -- which files -- */

static int inside(const char *path) {
    size_t length = control ? strnlen(control->folder, PATH) : 0;
    return length && !strncmp(path, control->folder, length) && (path[length] == '/' || !path[length]);
}

/* The path of a descriptor in `path`; 0 where it is none of ours. */
static int of_fd(int fd, char *path) {
    if (!control || !control->folder[0]) return 0;
    int before = errno;
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    static const char gone[] = " (deleted)";
    size_t tail = sizeof gone - 1;
    if ((size_t)length > tail && !strcmp(path + length - tail, gone)) path[length - tail] = 0;
    return inside(path);
}

static int of_path(int dir, const char *name, char *path) {
    if (!control || !control->folder[0] || !name) return 0;
    int before = errno;
    path[0] = 0;
    if (name[0] != '/') {
        char link[32];
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t length = readlink(dir == AT_FDCWD ? "/proc/self/cwd" : link, path, PATH - 2);
        if (length < 0) length = 0;
        path[length++] = '/';
        path[length] = 0;
    }
    errno = before;
    size_t length = strlen(path);
    snprintf(path + length, PATH - length, "%s", name);
    return inside(path);
}

/* -- orders -- */

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

static enum order gate(enum op op, const char *path, int64_t offset, int64_t length) {
    uint64_t number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    if (number <= CALLS) {
        struct call *call = &control->calls[number - 1];
        size_t size = strlen(path), most = sizeof call->path - 1;
        call->op = op;
        call->phase = control->phase;
        call->offset = offset;
        call->length = length;
        snprintf(call->path, sizeof call->path, "%s", size > most ? path + size - most : path);
    }
    enum mode mode = control->mode;
    uint64_t at = control->at;
    if (!at || number < at || (number > at && mode != ERROR_FOR_EVER)) return GO;
    if (mode == ERROR_FOR_EVER && number > at && !(control->kinds >> op & 1)) return GO;
    __atomic_add_fetch(&control->struck, 1, __ATOMIC_SEQ_CST);
    switch (mode) {
    case ERROR_ONCE: case ERROR_FOR_EVER: errno = control->error; return FAIL;
    case TORN_ERROR: if (op == WRITE) return HALF_THEN_FAIL; errno = control->error; return FAIL;
    case TORN_KILL: if (op == WRITE) return HALF_THEN_DIE; die(); return GO;
    case KILL_BEFORE: die(); return GO;
    case KILL_AFTER: return GO_THEN_DIE;
    default: return GO;
    }
}

/* -- the log -- */

static int is_recording(void) { return control->recording && control->log[0]; }

/* From here to `unlock` no other thread records, so that the log has the order in which the calls took effect. */
static int lock(void) {
    int wanted = is_recording();
    if (wanted) pthread_mutex_lock(&recording);
    return wanted;
}
static void unlock(void) { pthread_mutex_unlock(&recording); }

static void append(enum op op, const char *path, const char *second, uint64_t file, int64_t offset,
                   const void *data, int64_t size) {
    int before = errno;
    if (log_fd < 0) log_fd = (int)syscall(SYS_openat, AT_FDCWD, control->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    struct record head = {op, (uint32_t)strlen(path), (uint32_t)strlen(second), 0, file, offset, size};
    struct iovec parts[] = {{&head, sizeof head}, {(void *)path, head.path}, {(void *)second, head.second},
                            {(void *)data, data ? (size_t)size : 0}};
    if (syscall(SYS_writev, log_fd, parts, 4) < 0) die();
    errno = before;
}

static uint64_t inode(int fd) {
    struct stat found;
    return fstat(fd, &found) ? 0 : found.st_ino;
}

/* -- writing -- */

static ssize_t put(int fd, const void *data, size_t size, int64_t offset) {
    return offset < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, offset);
}

/* Every way to write comes here; an `offset` below 0 is where the descriptor stands. */
static ssize_t write_at(int fd, const void *data, size_t size, int64_t offset) {
    char path[PATH];
    if (!of_fd(fd, path)) return put(fd, data, size, offset);
    int64_t where = offset;
    if (where < 0) {
        struct stat found;
        int flags = (int)syscall(SYS_fcntl, fd, F_GETFL);
        where = flags >= 0 && (flags & O_APPEND) && !fstat(fd, &found) ? found.st_size : syscall(SYS_lseek, fd, 0, SEEK_CUR);
    }
    switch (gate(WRITE, path, where, (int64_t)size)) {
    case FAIL: return -1;
    case HALF_THEN_DIE: put(fd, data, size / 2, offset); die(); return -1;
    case HALF_THEN_FAIL: put(fd, data, size / 2, offset); errno = control->error; return -1;
    case GO_THEN_DIE: put(fd, data, size, offset); die(); return -1;
    default: break;
    }
    int wanted = lock();
    ssize_t written = put(fd, data, size, offset);
    if (wanted) {
        if (written > 0) append(WRITE, path, "", inode(fd), where, data, written);
        unlock();
    }
    return written;
}

ssize_t write(int fd, const void *data, size_t size) { return write_at(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return write_at(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return write_at(fd, data, size, offset); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    char path[PATH];
    if (!of_fd(fd, path)) return syscall(SYS_writev, fd, parts, count);
    for (int i = 0; i < count; i++) /* less than everything may be written by one call */
        if (parts[i].iov_len) return write_at(fd, parts[i].iov_base, parts[i].iov_len, -1);
    return 0;
}

/* Copying inside the kernel can't be torn: callers fall back to reading and writing. */
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    char path[PATH];
    if (!of_fd(out, path)) return REAL(sendfile)(out, in, offset, size);
    errno = ENOTSOCK;
    return -1;
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) { return sendfile(out, in, offset, size); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    char path[PATH];
    if (!of_fd(out, path)) return REAL(copy_file_range)(in, from, out, to, size, flags);
    errno = EXDEV;
    return -1;
}

/* -- calls with one result, 0 or -1 -- */

#define CHANGE(op, path, second, file, offset, size, call)                                        \
    do {                                                                                          \
        enum order order = gate(op, path, offset, size);                                          \
        if (order == FAIL) return -1;                                                             \
        int wanted = lock();                                                                      \
        uint64_t number = wanted ? file : 0;                                                      \
        int result = (int)(call);                                                                 \
        if (order == GO_THEN_DIE) die();                                                          \
        if (wanted) {                                                                             \
            if (!result) append(op, path, second, number, offset, NULL, 0);                       \
            unlock();                                                                             \
        }                                                                                         \
        return result;                                                                            \
    } while (0)

static uint64_t inode_of(const char *path) {
    struct stat found;
    return lstat(path, &found) ? 0 : found.st_ino;
}

int fsync(int fd) {
    char path[PATH];
    if (!of_fd(fd, path)) return (int)syscall(SYS_fsync, fd);
    CHANGE(FSYNC, path, "", inode(fd), 0, 0, syscall(SYS_fsync, fd));
}
int fdatasync(int fd) {
    char path[PATH];
    if (!of_fd(fd, path)) return (int)syscall(SYS_fdatasync, fd);
    CHANGE(FSYNC, path, "", inode(fd), 0, 0, syscall(SYS_fdatasync, fd));
}
int ftruncate64(int fd, off64_t size) {
    char path[PATH];
    if (!of_fd(fd, path)) return (int)syscall(SYS_ftruncate, fd, size);
    CHANGE(TRUNCATE, path, "", inode(fd), size, 0, syscall(SYS_ftruncate, fd, size));
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

/* Room that is taken in advance: recorded as a file that grows. */
static int allocate(int fd, int mode, int64_t offset, int64_t size) {
    char path[PATH];
    struct stat found;
    if (!of_fd(fd, path)) return (int)syscall(SYS_fallocate, fd, mode, offset, size);
    int64_t end = offset + size;
    if (fstat(fd, &found) || found.st_size >= end || mode) end = found.st_size;
    CHANGE(ALLOCATE, path, "", inode(fd), end, size, syscall(SYS_fallocate, fd, mode, offset, size));
}
int fallocate(int fd, int mode, off_t offset, off_t size) { return allocate(fd, mode, offset, size); }
int fallocate64(int fd, int mode, off64_t offset, off64_t size) { return allocate(fd, mode, offset, size); }
int posix_fallocate(int fd, off_t offset, off_t size) {
    int before = errno, error = allocate(fd, 0, offset, size) ? errno : 0;
    errno = before;
    return error;
}
int posix_fallocate64(int fd, off64_t offset, off64_t size) { return posix_fallocate(fd, offset, size); }

int unlinkat(int dir, const char *name, int flags) {
    char path[PATH];
    if (!of_path(dir, name, path)) return (int)syscall(SYS_unlinkat, dir, name, flags);
    CHANGE(UNLINK, path, "", inode_of(path), 0, 0, syscall(SYS_unlinkat, dir, name, flags));
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }

int renameat(int from, const char *old, int to, const char *new) {
    char path[PATH], second[PATH];
    int known = of_path(from, old, path);
    if (!of_path(to, new, second) && !known) return (int)syscall(SYS_renameat2, from, old, to, new, 0);
    CHANGE(RENAME, path, second, inode_of(path), 0, 0, syscall(SYS_renameat2, from, old, to, new, 0));
}
int rename(const char *old, const char *new) { return renameat(AT_FDCWD, old, AT_FDCWD, new); }

int linkat(int from, const char *old, int to, const char *new, int flags) {
    char path[PATH], second[PATH];
    int known = of_path(from, old, path);
    if (!of_path(to, new, second) && !known) return (int)syscall(SYS_linkat, from, old, to, new, flags);
    CHANGE(LINK, path, second, inode_of(path), 0, 0, syscall(SYS_linkat, from, old, to, new, flags));
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

/* -- opening: counts where it may create or change something; CREATE where it will, OPEN where the file is there -- */

static int open_at(int dir, const char *name, int flags, mode_t mode) {
    char path[PATH];
    int changes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
    if (!changes || !of_path(dir, name, path)) return (int)syscall(SYS_openat, dir, name, flags, mode);
    struct stat found;
    int is_new = flags & O_CREAT && lstat(path, &found);
    enum order order = gate(is_new ? CREATE : OPEN, path, 0, 0);
    if (order == FAIL) return -1;
    int wanted = lock();
    int fd = (int)syscall(SYS_openat, dir, name, flags, mode);
    if (order == GO_THEN_DIE) die();
    if (wanted) {
        if (fd >= 0 && is_new) append(CREATE, path, "", inode(fd), 0, NULL, 0);
        else if (fd >= 0 && flags & O_TRUNC) append(TRUNCATE, path, "", inode(fd), 0, NULL, 0);
        unlock();
    }
    return fd;
}

#define OPENER(name, head, dir, flags_in)               \
    int name head {                                     \
        mode_t mode = 0;                                \
        if ((flags_in) & (O_CREAT | O_TMPFILE)) {       \
            va_list rest;                               \
            va_start(rest, flags_in);                   \
            mode = va_arg(rest, mode_t);                \
            va_end(rest);                               \
        }                                               \
        return open_at(dir, path, flags_in, mode);      \
    }

OPENER(open, (const char *path, int flags, ...), AT_FDCWD, flags)
OPENER(open64, (const char *path, int flags, ...), AT_FDCWD, flags)
OPENER(openat, (int dir, const char *path, int flags, ...), dir, flags)
OPENER(openat64, (int dir, const char *path, int flags, ...), dir, flags)
int creat(const char *path, mode_t mode) { return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }
int __open_2(const char *path, int flags) { return open_at(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return open_at(AT_FDCWD, path, flags, 0); }
int __openat_2(int dir, const char *path, int flags) { return open_at(dir, path, flags, 0); }
int __openat64_2(int dir, const char *path, int flags) { return open_at(dir, path, flags, 0); }

/* -- clocks: the wall clock, and the one that runs on while the machine sleeps -- */

static int (*real_gettime)(clockid_t, struct timespec *);

static int64_t shift_of(clockid_t clock) {
    if (!control) return 0;
    switch (clock) {
    case CLOCK_REALTIME: case CLOCK_REALTIME_COARSE: return __atomic_load_n(&control->wall_ns, __ATOMIC_RELAXED);
    case CLOCK_BOOTTIME: return __atomic_load_n(&control->boot_ns, __ATOMIC_RELAXED);
    default: return 0;
    }
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!real_gettime) real_gettime = (int (*)(clockid_t, struct timespec *))real("clock_gettime");
    int result = real_gettime(clock, now);
    int64_t shift = shift_of(clock);
    if (!result && shift) {
        int64_t rest = now->tv_nsec + shift % 1000000000;
        now->tv_sec += shift / 1000000000 + (rest >= 1000000000) - (rest < 0);
        now->tv_nsec = (rest + 1000000000) % 1000000000;
    }
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &exact)) return -1;
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

/* godwit-guest: what Godwit asks of a guest. Each program started under emulation costs tens of
 * milliseconds, and what a restored machine executes first is translated anew: so all of it is one
 * static program, told by the name that it is called by.
 *
 * before-dock     Makes the machine small and still before its state is taken: user programs frozen,
 *                 files on disk, caches dropped, unused blocks given back, one vCPU.
 * after-activate  Makes a restored machine a machine of its own, then lets user programs go on; also
 *                 the way back on the machine that was docked. What is not given stays as it was:
 *   GODWIT_UNIX_NS     the time, nanoseconds since 1970
 *   GODWIT_SEED        hex digits that go into the kernel's random number generator
 *   GODWIT_HOSTNAME    host name
 *   GODWIT_MACHINE_ID  32 hex digits; a new one also means a new SSH host key
 * godwit-guest nic  Brings the network card up, as after-activate does at its end:
 *   GODWIT_ADDRESS     address of eth0, default 10.0.2.15/24, QEMU's user network
 *   GODWIT_GATEWAY     default route, default 10.0.2.2
 *   A card that is not there yet is awaited in the background.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/fs.h>
#include <linux/netlink.h>
#include <linux/random.h>
#include <linux/rtnetlink.h>
#include <mntent.h>
#include <net/if.h>
#include <net/route.h>
#include <poll.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CARD "eth0"
#define SSH_KEY "/etc/ssh/ssh_host_ed25519_key"
enum { MAX_SEED = 512, FREEZE_MS = 5000, CARD_MS = 60000 };

static const char *called;

static int fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s: ", called);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    return 1;
}

static int put(const char *path, const char *text, int flags) {
    int fd = open(path, O_WRONLY | O_CLOEXEC | flags, 0644);
    if (fd < 0) return -1;
    ssize_t n = write(fd, text, strlen(text));
    return close(fd) < 0 || n != (ssize_t)strlen(text) ? -1 : 0;
}

static long now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Takes every vCPU but the first online ("1") or offline ("0"); what cannot be hot-plugged stays. */
static void vcpus(const char *online) {
    glob_t found;
    if (glob("/sys/devices/system/cpu/cpu[1-9]*/online", 0, NULL, &found)) return;
    for (size_t i = 0; i < found.gl_pathc; i++) {
        char now = 0;
        int fd = open(found.gl_pathv[i], O_RDONLY | O_CLOEXEC);
        if (fd >= 0 && read(fd, &now, 1) == 1 && now != *online) put(found.gl_pathv[i], online, 0);
        if (fd >= 0) close(fd);
    }
    globfree(&found);
}

/* The cgroup of all user programs: systemd's slice, or the one that init made. */
static int in_user_cgroup(const char *file, int flags) {
    char path[128];
    const char *group = access("/sys/fs/cgroup/user.slice", F_OK) ? "user" : "user.slice";
    snprintf(path, sizeof path, "/sys/fs/cgroup/%s/%s", group, file);
    return open(path, flags | O_CLOEXEC);
}

/* Freezes (1) or thaws (0) the user programs, and waits until the kernel says so. */
static int user_programs(int frozen) {
    int fd = in_user_cgroup("cgroup.freeze", O_WRONLY);
    if (fd < 0) return errno == ENOENT ? 0 : -1;
    ssize_t written = write(fd, frozen ? "1" : "0", 1);
    close(fd);
    if (written != 1) return -1;
    int events = in_user_cgroup("cgroup.events", O_RDONLY);
    if (events < 0) return -1;
    int done = 0;
    for (long end = now_ms() + FREEZE_MS; !done;) {
        char text[256] = "";
        if (pread(events, text, sizeof text - 1, 0) < 0) break;
        const char *is = strstr(text, "frozen "), *populated = strstr(text, "populated ");
        done = is && atoi(is + 7) == frozen;
        /* An empty group never reports frozen. */
        done |= frozen && populated && atoi(populated + 10) == 0;
        struct pollfd changed = {.fd = events, .events = POLLPRI};
        long left = end - now_ms();
        if (!done && (left <= 0 || poll(&changed, 1, (int)left) < 0)) break;
    }
    close(events);
    return done ? 0 : -1;
}

/* Gives the blocks that no file uses back to the host. */
static void trim(void) {
    const char *where = "/";
    struct mntent *m;
    FILE *mounts = setmntent("/proc/self/mounts", "r");
    while (mounts && (m = getmntent(mounts)))
        if (!strcmp(m->mnt_dir, "/data") && !strcmp(m->mnt_type, "ext4")) where = "/data";
    if (mounts) endmntent(mounts);
    struct fstrim_range all = {.len = ~0ULL};
    int fd = open(where, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    /* A file system that cannot has nothing to give back. */
    (void)ioctl(fd, FITRIM, &all);
    close(fd);
}

/* This program is the first that runs after an activation: it is kept in memory. */
static void stay_in_memory(void) {
    char buffer[1 << 16];
    int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    while (fd >= 0 && read(fd, buffer, sizeof buffer) > 0) {
    }
    if (fd >= 0) close(fd);
}

static int before_dock(void) {
    if (user_programs(1)) {
        user_programs(0);
        return fail("user programs did not freeze within %d s", FREEZE_MS / 1000);
    }
    sync();
    put("/proc/sys/vm/drop_caches", "3", 0);
    trim();
    stay_in_memory();
    vcpus("0");
    return 0;
}

static int nibble(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

static int seed(const char *hex) {
    struct {
        struct rand_pool_info head;
        unsigned char bytes[MAX_SEED];
    } pool;
    size_t digits = strlen(hex), n = digits / 2;
    if (digits % 2 || n == 0 || n > MAX_SEED) {
        return fail("GODWIT_SEED wants 2 to %d hex digits", 2 * MAX_SEED);
    }
    for (size_t i = 0; i < n; i++) {
        int high = nibble(hex[2 * i]), low = nibble(hex[2 * i + 1]);
        if (high < 0 || low < 0) {
            return fail("GODWIT_SEED is not hexadecimal");
        }
        ((unsigned char *)pool.head.buf)[i] = (unsigned char)(high << 4 | low);
    }
    pool.head.entropy_count = (int)n * 8;
    pool.head.buf_size = (int)n;
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0) {
        return fail("seeding: %s", strerror(errno));
    }
    close(fd);
    return 0;
}

static int set_clock(const char *text) {
    char *end;
    errno = 0;
    unsigned long long ns = strtoull(text, &end, 10);
    if (errno || *end || end == text) {
        return fail("GODWIT_UNIX_NS is not a number");
    }
    struct timespec t = {.tv_sec = (time_t)(ns / 1000000000ULL), .tv_nsec = (long)(ns % 1000000000ULL)};
    if (clock_settime(CLOCK_REALTIME, &t) < 0) {
        return fail("setting the clock: %s", strerror(errno));
    }
    return 0;
}

static void set_ipv4(struct sockaddr *to, in_addr_t address) {
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = address};
    memcpy(to, &in, sizeof in);
}

static const char *setting(const char *name, const char *otherwise) {
    const char *text = getenv(name);
    return text && *text ? text : otherwise;
}

/* 1 when the card is up, 0 when there is none yet, -1 on a failure. */
static int card_up(void) {
    char address[64];
    struct ifreq card = {.ifr_name = CARD};
    snprintf(address, sizeof address, "%s", setting("GODWIT_ADDRESS", "10.0.2.15/24"));
    char *slash = strchr(address, '/');
    int prefix = slash ? atoi(slash + 1) : 24;
    if (slash) *slash = 0;
    in_addr_t ip = inet_addr(address), gateway = inet_addr(setting("GODWIT_GATEWAY", "10.0.2.2"));
    if (ip == INADDR_NONE || gateway == INADDR_NONE || prefix < 1 || prefix > 32) {
        fail("GODWIT_ADDRESS wants a.b.c.d/bits, GODWIT_GATEWAY a.b.c.d");
        return -1;
    }
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCGIFFLAGS, &card) < 0) {
        if (fd >= 0) close(fd);
        return 0;
    }
    short flags = card.ifr_flags;
    set_ipv4(&card.ifr_addr, ip);
    int bad = ioctl(fd, SIOCSIFADDR, &card) < 0;
    set_ipv4(&card.ifr_netmask, htonl(~0U << (32 - prefix)));
    bad |= ioctl(fd, SIOCSIFNETMASK, &card) < 0;
    card.ifr_flags = (short)(flags | IFF_UP);
    bad |= ioctl(fd, SIOCSIFFLAGS, &card) < 0;
    char name[] = CARD;
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY, .rt_dev = name};
    set_ipv4(&route.rt_dst, 0);
    set_ipv4(&route.rt_genmask, 0);
    set_ipv4(&route.rt_gateway, gateway);
    bad |= ioctl(fd, SIOCADDRT, &route) < 0 && errno != EEXIST;
    if (bad) fail("bringing " CARD " up: %s", strerror(errno));
    close(fd);
    return bad ? -1 : 1;
}

static int card_up_or_await(void) {
    int state = card_up();
    if (state != 0) return state < 0;
    pid_t child = fork();
    if (child < 0) return fail("waiting for " CARD ": %s", strerror(errno));
    if (child > 0) return 0;
    setsid();
    int null = open("/dev/null", O_RDWR);
    for (int fd = 0; fd < 3; fd++) dup2(null, fd);
    int news = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    struct sockaddr_nl links = {.nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK};
    if (news < 0 || bind(news, (struct sockaddr *)&links, sizeof links) < 0) _exit(1);
    /* Listening comes before looking: a card that appears between the two is not missed. */
    for (long end = now_ms() + CARD_MS; card_up() == 0;) {
        char skipped[4096];
        struct pollfd changed = {.fd = news, .events = POLLIN};
        long left = end - now_ms();
        if (left <= 0 || poll(&changed, 1, (int)left) <= 0) break;
        (void)!recv(news, skipped, sizeof skipped, MSG_DONTWAIT);
    }
    _exit(0);
}

static int new_host_key(const char *hostname) {
    glob_t old;
    if (!glob("/etc/ssh/ssh_host_*", 0, NULL, &old)) {
        for (size_t i = 0; i < old.gl_pathc; i++) unlink(old.gl_pathv[i]);
        globfree(&old);
    }
    char *args[] = {"ssh-keygen", "-q",  "-t", "ed25519",          "-N", "",
                    "-C",         (char *)hostname, "-f", SSH_KEY, NULL};
    pid_t child;
    int status;
    if (posix_spawn(&child, "/usr/bin/ssh-keygen", NULL, NULL, args, environ) ||
        waitpid(child, &status, 0) != child || status)
        return fail("no new SSH host key");
    return 0;
}

static int after_activate(void) {
    const char *hex = setting("GODWIT_SEED", NULL), *ns = setting("GODWIT_UNIX_NS", NULL);
    const char *host = setting("GODWIT_HOSTNAME", NULL), *id = setting("GODWIT_MACHINE_ID", NULL);
    char line[256];
    /* Entropy and time come first: what is made below depends on both. */
    if ((ns && set_clock(ns)) || (hex && seed(hex))) return 1;
    if (host) {
        snprintf(line, sizeof line, "%s\n", host);
        if (sethostname(host, strlen(host))) return fail("host name: %s", strerror(errno));
        if (put("/etc/hostname", line, O_CREAT | O_TRUNC))
            return fail("/etc/hostname: %s", strerror(errno));
    }
    if (id) {
        snprintf(line, sizeof line, "%s\n", id);
        /* In place, as systemd may have mounted over it. */
        if (put("/etc/machine-id", line, O_CREAT | O_TRUNC))
            return fail("/etc/machine-id: %s", strerror(errno));
        if (!access("/usr/sbin/sshd", X_OK) && new_host_key(host ? host : "")) return 1;
    }
    if (user_programs(0)) return fail("user programs did not thaw within %d s", FREEZE_MS / 1000);
    /* What they can do without for a moment. */
    vcpus("1");
    return card_up_or_await();
}

int main(int argc, char **argv) {
    called = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    if (!strcmp(called, "before-dock")) return before_dock();
    if (!strcmp(called, "after-activate")) return after_activate();
    if (argc == 2 && !strcmp(argv[1], "nic")) return card_up_or_await();
    return fail("call it as before-dock, as after-activate, or with the argument nic");
}

/* godwit-guest: what Godwit asks of a guest. Each program started under emulation costs tens of
 * milliseconds, and what a restored machine executes first is translated anew: so all of it is one
 * static program, told by the name that it is called by.
 *
 * before-dock     Makes the machine small and still before its state is taken: user programs frozen,
 *                 files on disk, caches dropped, unused blocks given back, one vCPU.
 *   GODWIT_CARD=keep   The network card stays in the machine, its interface down; says "card kept" if
 *                      so. It is the host's to take a card away that is not kept.
 * after-activate  Makes a restored machine a machine of its own, then lets user programs go on; also
 *                 the way back on the machine that was docked. What is not given stays as it was:
 *   GODWIT_UNIX_NS     the time, nanoseconds since 1970
 *   GODWIT_SEED        hex digits that go into the kernel's random number generator
 *   GODWIT_HOSTNAME    host name
 *   GODWIT_MACHINE_ID  32 hex digits; a new one also means a new SSH host key
 *   GODWIT_MAC         address of the card that was kept, a:b:c:d:e:f in hex
 * godwit-guest agent PORT
 *                 The guest agent as Godwit's hosts know it: qemu-ga, which it starts, answers what
 *                 comes in at PORT, but for one question that is answered here (see below): it would
 *                 take qemu-ga a fork and an exec, most of what a restored machine has to do.
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
#include <limits.h>
#include <linux/fs.h>
#include <linux/netlink.h>
#include <linux/random.h>
#include <linux/rtnetlink.h>
#include <mntent.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CARD "eth0"
#define SSH_KEY "/etc/ssh/ssh_host_ed25519_key"
enum { MAX_SEED = 512, FREEZE_MS = 5000, CARD_MS = 60000 };

static const char *called;
/* What went wrong last. */
static char said[256];

static int fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(said, sizeof said, format, args);
    va_end(args);
    fprintf(stderr, "%s: %s\n", called, said);
    return 1;
}

static int put(const char *path, const char *text, int flags) {
    int fd = open(path, O_WRONLY | O_CLOEXEC | flags, 0644);
    if (fd < 0) return -1;
    ssize_t n = write(fd, text, strlen(text));
    return close(fd) < 0 || n != (ssize_t)strlen(text) ? -1 : 0;
}

/* The whole content of a file from now on. In place, as something may be mounted over it, and
 * without cutting it first: to give its page back and take another is far more to do. */
static int rewrite(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) return -1;
    ssize_t n = (ssize_t)strlen(text);
    int bad = write(fd, text, (size_t)n) != n || (lseek(fd, 0, SEEK_END) != n && ftruncate(fd, n));
    return close(fd) < 0 || bad ? -1 : 0;
}

/* Writes `n` without printf, whose translation takes an emulated machine milliseconds. */
static char *decimal(char *to, unsigned long long n) {
    char digits[24];
    int i = 0;
    do digits[i++] = (char)('0' + n % 10);
    while (n /= 10);
    while (i) *to++ = digits[--i];
    *to = 0;
    return to;
}

static long now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* What the resident agent knows and has open before it is asked; -1: find out, open it then. */
static int kept_random = -1, kept_freeze = -1;
static long kept_cpus = -1;

/* Takes every vCPU but the first online ("1") or offline ("0"); what cannot be hot-plugged stays. */
static void vcpus(const char *online) {
    for (int n = 1; n != kept_cpus; n++) {
        char path[64], now = 0;
        stpcpy(decimal(stpcpy(path, "/sys/devices/system/cpu/cpu"), (unsigned)n), "/online");
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) break;
        if (read(fd, &now, 1) == 1 && now != *online) put(path, online, 0);
        close(fd);
    }
}

/* The cgroup of all user programs: systemd's slice, or the one that init made. */
static int in_user_cgroup(const char *file, int flags) {
    char path[128];
    const char *group = access("/sys/fs/cgroup/user.slice", F_OK) ? "user" : "user.slice";
    char *end = stpcpy(stpcpy(path, "/sys/fs/cgroup/"), group);
    stpcpy(stpcpy(end, "/"), file);
    return open(path, flags | O_CLOEXEC);
}

/* Freezes (1) or thaws (0) the user programs. That they are frozen is waited for until the kernel
 * says so; that they are not is so once it has been told. */
static int user_programs(int frozen) {
    if (!frozen && kept_freeze >= 0 && pwrite(kept_freeze, "0", 1, 0) == 1) return 0;
    int fd = in_user_cgroup("cgroup.freeze", O_WRONLY);
    if (fd < 0) return errno == ENOENT ? 0 : -1;
    ssize_t written = write(fd, frozen ? "1" : "0", 1);
    close(fd);
    if (written != 1) return -1;
    if (!frozen) return 0;
    int events = in_user_cgroup("cgroup.events", O_RDONLY);
    if (events < 0) return -1;
    int done = 0;
    for (long end = now_ms() + FREEZE_MS; !done;) {
        char text[256] = "";
        if (pread(events, text, sizeof text - 1, 0) < 0) break;
        const char *is = strstr(text, "frozen "), *populated = strstr(text, "populated ");
        done = is && atoi(is + 7) == 1;
        /* An empty group never reports frozen. */
        done |= populated && atoi(populated + 10) == 0;
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

/* What the resident agent was told, NAME=value each; it comes before the environment. */
enum { MAX_TOLD = 8 };
static const char *told[MAX_TOLD];

static const char *setting(const char *name, const char *otherwise) {
    size_t n = strlen(name);
    for (int i = 0; i < MAX_TOLD && told[i]; i++)
        if (!strncmp(told[i], name, n) && told[i][n] == '=') return told[i] + n + 1;
    const char *text = getenv(name);
    return text && *text ? text : otherwise;
}

/* Whether there is a card and its interface is down: nothing comes from it or goes out any more. */
static int card_down(void) {
    struct ifreq card = {.ifr_name = CARD};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    int down = fd >= 0 && ioctl(fd, SIOCGIFFLAGS, &card) == 0;
    card.ifr_flags &= (short)~IFF_UP;
    down = down && ioctl(fd, SIOCSIFFLAGS, &card) == 0;
    if (fd >= 0) close(fd);
    return down;
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
    if (!strcmp(setting("GODWIT_CARD", ""), "keep") && card_down()) puts("card kept");
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
    int fd = kept_random >= 0 ? kept_random : open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0) {
        return fail("seeding: %s", strerror(errno));
    }
    if (fd != kept_random) close(fd);
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

/* Gives the card that was kept its address. */
static int card_address(const char *mac) {
    struct ifreq card = {.ifr_name = CARD, .ifr_hwaddr.sa_family = ARPHRD_ETHER};
    for (int i = 0; i < 6; i++, mac += 3) {
        int high = nibble(mac[0]), low = high < 0 ? -1 : nibble(mac[1]);
        if (low < 0 || mac[2] != (i < 5 ? ':' : 0)) return fail("GODWIT_MAC wants a:b:c:d:e:f");
        card.ifr_hwaddr.sa_data[i] = (char)(high << 4 | low);
    }
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    int bad = fd < 0 || ioctl(fd, SIOCSIFHWADDR, &card) < 0;
    if (bad) fail("the address of " CARD ": %s", strerror(errno));
    if (fd >= 0) close(fd);
    return bad;
}

static void set_ipv4(struct sockaddr *to, in_addr_t address) {
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = address};
    memcpy(to, &in, sizeof in);
}

/* 1 when the card is up, 0 when there is none yet, -1 on a failure. */
static int card_up(void) {
    char text[64] = "", *slash = NULL;
    struct ifreq card = {.ifr_name = CARD};
    const char *wanted = setting("GODWIT_ADDRESS", "10.0.2.15/24");
    if (strlen(wanted) < sizeof text) slash = strchr(strcpy(text, wanted), '/');
    int prefix = slash ? atoi(slash + 1) : 24;
    if (slash) *slash = 0;
    in_addr_t ip = inet_addr(text), gateway = inet_addr(setting("GODWIT_GATEWAY", "10.0.2.2"));
    if (ip == INADDR_NONE || gateway == INADDR_NONE || prefix < 1 || prefix > 32) {
        fail("GODWIT_ADDRESS wants a.b.c.d/bits, GODWIT_GATEWAY a.b.c.d");
        return -1;
    }
    /* Asked for a card that it does not have, the kernel would start modprobe. */
    if (!setting("GODWIT_MAC", NULL) && access("/sys/class/net/" CARD, F_OK)) return 0;
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

/* News of network cards; what is read from it says only that there are some. */
static int card_news(void) {
    int news = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_ROUTE);
    struct sockaddr_nl links = {.nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK};
    if (news >= 0 && bind(news, (struct sockaddr *)&links, sizeof links) < 0) {
        close(news);
        return -1;
    }
    return news;
}

static void skip_news(int news) {
    char skipped[4096];
    while (recv(news, skipped, sizeof skipped, MSG_DONTWAIT) > 0) {
    }
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
    int news = card_news();
    if (news < 0) _exit(1);
    /* Listening comes before looking: a card that appears between the two is not missed. */
    for (long end = now_ms() + CARD_MS; card_up() == 0;) {
        struct pollfd changed = {.fd = news, .events = POLLIN};
        long left = end - now_ms();
        if (left <= 0 || poll(&changed, 1, (int)left) <= 0) break;
        skip_news(news);
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

/* Everything but to bring the network card up. */
static int renew(void) {
    const char *hex = setting("GODWIT_SEED", NULL), *ns = setting("GODWIT_UNIX_NS", NULL);
    const char *host = setting("GODWIT_HOSTNAME", NULL), *id = setting("GODWIT_MACHINE_ID", NULL);
    const char *mac = setting("GODWIT_MAC", NULL);
    char line[256];
    /* Entropy and time come first: what is made below depends on both. */
    if ((ns && set_clock(ns)) || (hex && seed(hex))) return 1;
    if (host) {
        if (strlen(host) > HOST_NAME_MAX || sethostname(host, strlen(host)))
            return fail("host name: %s", strerror(errno));
        stpcpy(stpcpy(line, host), "\n");
        if (rewrite("/etc/hostname", line)) return fail("/etc/hostname: %s", strerror(errno));
    }
    if (id) {
        if (strlen(id) > 64) return fail("GODWIT_MACHINE_ID is too long");
        stpcpy(stpcpy(line, id), "\n");
        if (rewrite("/etc/machine-id", line)) return fail("/etc/machine-id: %s", strerror(errno));
        if (!access("/usr/sbin/sshd", X_OK) && new_host_key(host ? host : "")) return 1;
    }
    if (mac && card_address(mac)) return 1;
    if (user_programs(0)) return fail("user programs did not thaw: %s", strerror(errno));
    /* What they can do without for a moment. */
    vcpus("1");
    return 0;
}

static int after_activate(void) {
    return renew() || card_up_or_await();
}

/* The resident agent. A line of the host's that begins with QUESTION is answered here,
 *   {"execute":"godwit-activate","arguments":{"id":7,"set":"GODWIT_SEED=.. GODWIT_HOSTNAME=.."}}
 *   <- 0xff {"return":7}     or     0xff {"error":{"desc":".."},"id":7}
 * and does what after-activate does, only that a card which is not there yet is awaited for good.
 * Asked again with the same id, which no two activations have, it only answers again. All other lines go to qemu-ga, and whatever
 * that says to the host. Everything is ready when the machine is docked: pages, descriptors, the
 * socket for news of cards. */
#define GA_SOCKET "/run/godwit-ga"
#define QUESTION "{\"execute\":\"godwit-activate\",\"arguments\":{\"id\":"
enum { MARK = 0xff, PIECE = 1 << 16, MAX_LINE = 2048, LISTENING = 3 };

/* What was read from one side and is still to be written to the other. */
struct way {
    char bytes[PIECE + MAX_LINE];
    size_t from, to;
};

static struct way to_ga, to_host;
/* The beginning of a line that may be for us; what is to be answered; whether a line for qemu-ga, or
 * one of its answers, is not at its end. */
static char held[MAX_LINE], reply[sizeof said + 64];
static size_t held_len;
static int passing, answering, awaits_card;
static unsigned long long last_id;
static int last_bad;

static int writing(struct way *way, int fd) {
    ssize_t n = write(fd, way->bytes + way->from, way->to - way->from);
    if (n < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
    way->from += (size_t)n;
    return 0;
}

static int left(const struct way *way) { return way->from < way->to; }

static void pass(const char *bytes, size_t n) {
    memcpy(to_ga.bytes + to_ga.to, bytes, n);
    to_ga.to += n;
}

/* Sets what a question tells, which stays in `held`; whether it is whole. */
static int be_told(char *from) {
    char *set = strstr(from, "\"set\":\""), *stop = set ? strchr(set + 7, '"') : NULL;
    memset(told, 0, sizeof told);
    if (!stop) return 0;
    *stop = 0;
    for (int i = 0; i < MAX_TOLD && set; i++) {
        told[i] = set += i ? 1 : 7;
        set = strchr(set, ' ');
        if (set) *set = 0;
    }
    return !set;
}

static void be_asked(void) {
    unsigned long long id = 0;
    char *at = held + strlen(QUESTION);
    while (*at >= '0' && *at <= '9') id = id * 10 + (unsigned)(*at++ - '0');
    if (id != last_id) {
        last_id = id;
        last_bad = be_told(at) ? renew() : fail("a question that is not whole");
        int card = last_bad ? 0 : card_up();
        last_bad |= card < 0;
        awaits_card = card == 0;
        for (char *c = said; *c; c++)
            if (*c < ' ' || *c == '"' || *c == '\\') *c = '?';
    }
    at = reply;
    *at++ = (char)MARK;
    if (last_bad) at = stpcpy(stpcpy(stpcpy(at, "{\"error\":{\"desc\":\""), said), "\"},\"id\":");
    else at = stpcpy(at, "{\"return\":");
    stpcpy(decimal(at, id), "}\n");
}

/* Takes what the host said apart into lines for qemu-ga and those for us. */
static void hear(const char *in, size_t n) {
    const size_t asks = strlen(QUESTION);
    to_ga.from = to_ga.to = 0;
    for (const char *end = in + n; in < end;) {
        if (passing) {
            const char *stop = memchr(in, '\n', (size_t)(end - in));
            size_t part = (size_t)((stop ? stop + 1 : end) - in);
            pass(in, part);
            in += part;
            passing = !stop;
            continue;
        }
        char c = *in++;
        if (!held_len && c == '\n') continue;
        held[held_len++] = c;
        if (held_len <= asks ? c != QUESTION[held_len - 1] : held_len == sizeof held) {
            pass(held, held_len);
            held_len = 0;
            passing = c != '\n';
        } else if (c == '\n') {
            held[held_len - 1] = 0;
            held_len = 0;
            be_asked();
        }
    }
}

/* Starts qemu-ga; gives a connection to it that nobody else can make. */
static int start_ga(void) {
    struct sockaddr_un at = {.sun_family = AF_UNIX, .sun_path = GA_SOCKET};
    int listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int mine = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    unlink(GA_SOCKET);
    mode_t before = umask(0177);
    int bad = listening < 0 || mine < 0 || bind(listening, (struct sockaddr *)&at, sizeof at) ||
              listen(listening, 1) || connect(mine, (struct sockaddr *)&at, sizeof at);
    umask(before);
    if (bad) {
        fail("a socket for qemu-ga: %s", strerror(errno));
        return -1;
    }
    pid_t child = fork();
    if (child < 0) {
        fail("starting qemu-ga: %s", strerror(errno));
        return -1;
    }
    if (child == 0) {
        char pid[32];
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        snprintf(pid, sizeof pid, "%d", (int)getpid());
        setenv("LISTEN_PID", pid, 1);
        setenv("LISTEN_FDS", "1", 1);
        if (listening == LISTENING) fcntl(listening, F_SETFD, 0);
        else dup2(listening, LISTENING);
        execlp("qemu-ga", "qemu-ga", "-t", "/run", "-f", "/run/qemu-ga.pid", NULL);
        _exit(127);
    }
    close(listening);
    unlink(GA_SOCKET);
    fcntl(mine, F_SETFL, O_NONBLOCK);
    return mine;
}

static void woken(int signal) { (void)signal; }

/* Says something to the host once qemu-ga is at the end of what it says. */
static void answer(void) {
    if (!*reply || answering || left(&to_host)) return;
    to_host.from = 0;
    to_host.to = strlen(reply);
    memcpy(to_host.bytes, reply, to_host.to);
    *reply = 0;
}

/* While no host is at the port, that somebody is there is told by a signal. */
static int is_away(int port, int now) {
    if (fcntl(port, F_SETFL, now ? O_NONBLOCK | O_ASYNC : O_NONBLOCK) < 0) return 0;
    struct pollfd there = {.fd = port, .events = POLLIN};
    return now && poll(&there, 1, 0) == 1 && there.revents & POLLHUP;
}

static int agent(const char *path) {
    static char heard[PIECE];
    sigset_t host_came, none;
    int port = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (port < 0) return fail("%s: %s", path, strerror(errno));
    int ga = start_ga(), news = card_news(), away = 0;
    if (ga < 0) return 1;
    sigemptyset(&none);
    sigemptyset(&host_came);
    sigaddset(&host_came, SIGIO);
    sigprocmask(SIG_BLOCK, &host_came, NULL);
    sigaction(SIGIO, &(struct sigaction){.sa_handler = woken}, NULL);
    fcntl(port, F_SETOWN, getpid());
    kept_random = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    kept_cpus = sysconf(_SC_NPROCESSORS_CONF);
    kept_freeze = in_user_cgroup("cgroup.freeze", O_WRONLY);
    if (mlockall(MCL_CURRENT | MCL_FUTURE)) fail("locking memory: %s", strerror(errno));
    for (;;) {
        short for_host = (short)((left(&to_ga) || *reply ? 0 : POLLIN) | (left(&to_host) ? POLLOUT : 0));
        short for_ga = (short)((left(&to_host) ? 0 : POLLIN) | (left(&to_ga) ? POLLOUT : 0));
        struct pollfd all[] = {{.fd = away ? -1 : port, .events = for_host},
                               {.fd = ga, .events = for_ga},
                               {.fd = awaits_card ? news : -1, .events = POLLIN}};
        if (ppoll(all, 3, NULL, &none) < 0) {
            if (errno != EINTR) return fail("poll: %s", strerror(errno));
            away = away && is_away(port, 1);
            if (!away) is_away(port, 0);
            continue;
        }
        if (all[0].revents & POLLHUP) away = is_away(port, 1);
        if (all[0].revents & POLLIN) {
            ssize_t n = read(port, heard, sizeof heard);
            if (n > 0) hear(heard, (size_t)n);
            answer();
        }
        if (all[1].revents & (POLLHUP | POLLERR)) return fail("qemu-ga ended");
        if (all[1].revents & POLLIN) {
            ssize_t n = read(ga, to_host.bytes, PIECE);
            if (n == 0) return fail("qemu-ga ended");
            to_host.from = 0;
            to_host.to = n > 0 ? (size_t)n : 0;
            if (n > 0) answering = to_host.bytes[n - 1] != '\n';
        }
        if ((left(&to_host) && writing(&to_host, port)) || (left(&to_ga) && writing(&to_ga, ga)))
            return fail("passing on: %s", strerror(errno));
        answer();
        if (all[2].revents) {
            skip_news(news);
            awaits_card = card_up() == 0;
        }
    }
}

int main(int argc, char **argv) {
    called = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    if (!strcmp(called, "before-dock")) return before_dock();
    if (!strcmp(called, "after-activate")) return after_activate();
    if (argc == 2 && !strcmp(argv[1], "nic")) return card_up_or_await();
    if (argc == 3 && !strcmp(argv[1], "agent")) return agent(argv[2]);
    return fail("call it as before-dock, as after-activate, or with nic, or with agent and a port");
}

/* godwit-renew [nic]: the parts of an activation that shell tools would make slow; each program
 * started under emulation costs tens of milliseconds, so this is one static program.
 *
 *   GODWIT_UNIX_NS   the clock is set to this many nanoseconds since 1970
 *   GODWIT_SEED      hex digits that go into the kernel's random number generator
 *   GODWIT_ADDRESS   address of eth0, default 10.0.2.15/24, QEMU's user network
 *   GODWIT_GATEWAY   default route, default 10.0.2.2
 *
 * Clock and seed are left alone when they are absent; `nic` does the network card only. A card
 * plugged at this moment may appear a little later: it is then awaited in the background.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/random.h>
#include <net/if.h>
#include <net/route.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#define CARD "eth0"
enum { MAX_SEED = 512 };

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
        fprintf(stderr, "godwit-renew: GODWIT_SEED wants 2 to %d hex digits\n", 2 * MAX_SEED);
        return 1;
    }
    for (size_t i = 0; i < n; i++) {
        int high = nibble(hex[2 * i]), low = nibble(hex[2 * i + 1]);
        if (high < 0 || low < 0) {
            fprintf(stderr, "godwit-renew: GODWIT_SEED is not hexadecimal\n");
            return 1;
        }
        ((unsigned char *)pool.head.buf)[i] = (unsigned char)(high << 4 | low);
    }
    pool.head.entropy_count = (int)n * 8;
    pool.head.buf_size = (int)n;
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0) {
        fprintf(stderr, "godwit-renew: seeding: %s\n", strerror(errno));
        return 1;
    }
    close(fd);
    return 0;
}

static int set_clock(const char *text) {
    char *end;
    errno = 0;
    unsigned long long ns = strtoull(text, &end, 10);
    if (errno || *end || end == text) {
        fprintf(stderr, "godwit-renew: GODWIT_UNIX_NS is not a number\n");
        return 1;
    }
    struct timespec t = {.tv_sec = (time_t)(ns / 1000000000ULL), .tv_nsec = (long)(ns % 1000000000ULL)};
    if (clock_settime(CLOCK_REALTIME, &t) < 0) {
        fprintf(stderr, "godwit-renew: setting the clock: %s\n", strerror(errno));
        return 1;
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
        fprintf(stderr, "godwit-renew: GODWIT_ADDRESS wants a.b.c.d/bits, GODWIT_GATEWAY a.b.c.d\n");
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
    if (bad) fprintf(stderr, "godwit-renew: bringing " CARD " up: %s\n", strerror(errno));
    close(fd);
    return bad ? -1 : 1;
}

static int card_up_or_await(void) {
    int state = card_up();
    if (state != 0) return state < 0;
    pid_t child = fork();
    if (child < 0) return 1;
    if (child > 0) return 0;
    setsid();
    int null = open("/dev/null", O_RDWR);
    for (int fd = 0; fd < 3; fd++) dup2(null, fd);
    const struct timespec pause = {.tv_nsec = 20000000};
    for (int i = 0; i < 500 && card_up() == 0; i++) nanosleep(&pause, NULL);
    _exit(0);
}

int main(int argc, char **argv) {
    const char *hex = getenv("GODWIT_SEED"), *ns = getenv("GODWIT_UNIX_NS");
    int failed = 0;
    if (argc < 2 || strcmp(argv[1], "nic")) {
        if (ns && *ns) failed |= set_clock(ns);
        if (hex && *hex) failed |= seed(hex);
    }
    return failed | card_up_or_await();
}

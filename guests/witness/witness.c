/* godwit-witness: a program whose memory and file prove that nothing was lost or mixed up.
 *
 *   run --memory-mib N --file F [--signs T]
 *                                 keeps a changing, checkable pattern in N MiB of memory and
 *                                 appends numbered, checksummed lines to F, each made durable;
 *                                 shows signs of life on the terminal T
 *   status [--reset]              asks the running one; prints {"steps","lines","memory_ok",
 *                                 "last_gap_ms","max_gap_ms","memory_bytes","written_bytes"};
 *                                 --reset starts max_gap_ms and written_bytes anew
 *   check --file F                verifies every line of F; prints {"lines","ok","error"}
 *
 * Memory: every page carries its number, the step that wrote it, words drawn from both, and a
 * checksum. A step rewrites a few pages, each verified in full first; a second table outside the
 * pages says which step each must be from, so a page that is old but whole is found too.
 * Time: a thread of its own beats every two milliseconds and keeps the largest gap between two beats
 * on CLOCK_MONOTONIC: how long the program could not run.
 * Signs of life, for somebody outside who has a clock of his own: a '.' every 20 ms by that thread,
 * a '+' by the program after every other step of its work.
 * Its own share of what a move carries: the pattern is noise that nothing packs. memory_bytes is all
 * of it, written_bytes what was rewritten of it, page after page in turn, since the last reset.
 * File: "NUMBER STEP UNIX_NS CHECKSUM\n", numbers from 1 without a hole.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SOCKET_PATH "/run/godwit-witness.sock"
enum {
    PAGE = 4096,
    WORDS = PAGE / 8,
    PAGES_PER_STEP = 8,
    STEP_MS = 10,
    STEPS_PER_LINE = 10,
    STEPS_PER_SIGN = 2,
    BEATS_PER_SIGN = 10,
    LINE_MAX_BYTES = 128,
};

struct page {
    uint64_t number, step, checksum, words[WORDS - 3];
};

static struct page *pages;
static uint64_t *page_step; /* the step each page must be from */
static uint64_t page_count, steps, lines, steps_at_reset;
static int signs = -1; /* where signs of life go */
static _Atomic int64_t last_gap_ns, max_gap_ns;

static void die(const char *what) {
    fprintf(stderr, "godwit-witness: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* FNV-1a over 64-bit words: every bit counts, and it is cheap under emulation. */
static uint64_t mix(uint64_t hash, uint64_t word) { return (hash ^ word) * 0x100000001b3ULL; }

static uint64_t text_checksum(const char *text, size_t n) {
    uint64_t hash = 0xcbf29ce484222325ULL;
    for (size_t i = 0; i < n; i++) hash = mix(hash, (unsigned char)text[i]);
    return hash;
}

static uint64_t next_word(uint64_t x) {
    x ^= x << 13;
    x ^= x >> 7;
    return x ^ x << 17;
}

static uint64_t first_word(uint64_t number, uint64_t step) {
    uint64_t x = mix(mix(0xcbf29ce484222325ULL, number + 1), step + 1);
    return x ? x : 1;
}

static void stamp(uint64_t number, uint64_t step) {
    struct page *p = &pages[number];
    uint64_t x = first_word(number, step), sum = mix(mix(0, number), step);
    for (size_t i = 0; i < WORDS - 3; i++) {
        x = next_word(x);
        p->words[i] = x;
        sum = mix(sum, x);
    }
    p->number = number;
    p->step = step;
    p->checksum = sum;
    page_step[number] = step;
}

static int page_ok(uint64_t number) {
    const struct page *p = &pages[number];
    uint64_t step = page_step[number];
    uint64_t x = first_word(number, step), sum = mix(mix(0, number), step);
    if (p->number != number || p->step != step) return 0;
    for (size_t i = 0; i < WORDS - 3; i++) {
        x = next_word(x);
        if (p->words[i] != x) return 0;
        sum = mix(sum, x);
    }
    return p->checksum == sum;
}

static int all_pages_ok(void) {
    for (uint64_t i = 0; i < page_count; i++)
        if (!page_ok(i)) return 0;
    return 1;
}

/* Verifies one line without its newline; 0 when it is line `number`. */
static int line_bad(const char *line, uint64_t number) {
    uint64_t n, step, ns, sum;
    int body_end = 0, end = 0;
    if (sscanf(line, "%" SCNu64 " %" SCNu64 " %" SCNu64 "%n %" SCNx64 "%n", &n, &step, &ns,
               &body_end, &sum, &end) != 4)
        return 1;
    return line[end] != 0 || n != number || text_checksum(line, (size_t)body_end) != sum;
}

/* Counts the good lines of `path`; `why` is set at the first bad one. */
static uint64_t check_file(const char *path, const char **why) {
    char line[LINE_MAX_BYTES];
    uint64_t good = 0;
    FILE *f = fopen(path, "re");
    *why = NULL;
    if (!f) {
        *why = strerror(errno);
        return 0;
    }
    while (fgets(line, sizeof line, f)) {
        size_t n = strlen(line);
        if (n == 0 || line[n - 1] != '\n') {
            *why = "a line has no end";
            break;
        }
        line[n - 1] = 0;
        if (line_bad(line, good + 1)) {
            *why = "a line is damaged, missing or out of order";
            break;
        }
        good++;
    }
    if (ferror(f)) *why = "the file cannot be read";
    fclose(f);
    return good;
}

static void append_line(int fd) {
    char line[LINE_MAX_BYTES];
    int n = snprintf(line, sizeof line, "%" PRIu64 " %" PRIu64 " %" PRIu64, lines + 1, steps,
                     (uint64_t)now_ns(CLOCK_REALTIME));
    n += snprintf(line + n, sizeof line - (size_t)n, " %016" PRIx64 "\n",
                  text_checksum(line, (size_t)n));
    if (write(fd, line, (size_t)n) != n) die("appending a line");
    if (fsync(fd) < 0) die("making a line durable");
    lines++;
}

/* A terminal that is full or gone is nobody's business here. */
static void sign(char of) {
    if (signs >= 0) (void)!write(signs, &of, 1);
}

static void *beat(void *unused) {
    int64_t last = now_ns(CLOCK_MONOTONIC);
    const struct timespec pause = {.tv_nsec = 2000000};
    (void)unused;
    for (uint64_t beats = 1;; beats++) {
        nanosleep(&pause, NULL);
        if (beats % BEATS_PER_SIGN == 0) sign('.');
        int64_t now = now_ns(CLOCK_MONOTONIC), gap = now - last;
        last = now;
        atomic_store(&last_gap_ns, gap);
        if (gap > atomic_load(&max_gap_ns)) atomic_store(&max_gap_ns, gap);
    }
    return NULL;
}

static void status_json(int fd, int memory_ok) {
    uint64_t written = (steps - steps_at_reset) * PAGES_PER_STEP;
    dprintf(fd,
            "{\"steps\":%" PRIu64 ",\"lines\":%" PRIu64
            ",\"memory_ok\":%s,\"last_gap_ms\":%.3f,\"max_gap_ms\":%.3f,"
            "\"memory_bytes\":%" PRIu64 ",\"written_bytes\":%" PRIu64 "}\n",
            steps, lines, memory_ok ? "true" : "false", atomic_load(&last_gap_ns) / 1e6,
            atomic_load(&max_gap_ns) / 1e6, page_count * PAGE, written * PAGE);
}

static int status_socket(struct sockaddr_un *address) {
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) die("making a socket");
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    strcpy(address->sun_path, SOCKET_PATH);
    return fd;
}

static void answer(int listener, int memory_ok) {
    char request[8] = {0};
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) return;
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    if (poll(&ready, 1, 1000) == 1 && read(fd, request, sizeof request - 1) > 0) {
        status_json(fd, memory_ok && all_pages_ok());
        if (request[0] == 'r') {
            atomic_store(&max_gap_ns, 0);
            steps_at_reset = steps;
        }
    }
    close(fd);
}

static int run(uint64_t memory_mib, const char *path, const char *terminal) {
    const char *why;
    if (access(path, F_OK) == 0) {
        lines = check_file(path, &why);
        if (why) {
            fprintf(stderr, "godwit-witness: %s: %s after line %" PRIu64 "\n", path, why, lines);
            return 1;
        }
    }
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd < 0) die(path);

    if (terminal) {
        signs = open(terminal, O_WRONLY | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
        if (signs < 0) die(terminal);
    }

    page_count = memory_mib * (1024 * 1024 / PAGE);
    pages = mmap(NULL, page_count * PAGE, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    page_step = calloc(page_count, sizeof *page_step);
    if (pages == MAP_FAILED || !page_step) die("taking memory");
    for (uint64_t i = 0; i < page_count; i++) stamp(i, 0);

    struct sockaddr_un address;
    int listener = status_socket(&address);
    unlink(SOCKET_PATH);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 4) < 0)
        die("listening on " SOCKET_PATH);

    pthread_t thread;
    if ((errno = pthread_create(&thread, NULL, beat, NULL))) die("starting the heartbeat");

    int memory_ok = 1;
    uint64_t next = 0;
    struct pollfd ready = {.fd = listener, .events = POLLIN};
    for (;;) {
        steps++;
        for (int i = 0; i < PAGES_PER_STEP; i++, next = (next + 1) % page_count) {
            memory_ok &= page_ok(next);
            stamp(next, steps);
        }
        if (steps % STEPS_PER_LINE == 0) append_line(fd);
        if (steps % STEPS_PER_SIGN == 0) sign('+');
        if (poll(&ready, 1, STEP_MS) == 1) answer(listener, memory_ok);
    }
}

static int status(int reset) {
    struct sockaddr_un address;
    char reply[512];
    int fd = status_socket(&address);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        die("no running godwit-witness at " SOCKET_PATH);
    if (write(fd, reset ? "r" : "s", 1) != 1) die("asking");
    ssize_t n, total = 0;
    while ((n = read(fd, reply, sizeof reply)) > 0) {
        fwrite(reply, 1, (size_t)n, stdout);
        total += n;
    }
    if (total == 0) {
        fprintf(stderr, "godwit-witness: no answer\n");
        return 1;
    }
    return 0;
}

static int check(const char *path) {
    const char *why;
    uint64_t good = check_file(path, &why);
    if (why)
        printf("{\"lines\":%" PRIu64 ",\"ok\":false,\"error\":\"%s\"}\n", good, why);
    else
        printf("{\"lines\":%" PRIu64 ",\"ok\":true,\"error\":null}\n", good);
    return why != NULL;
}

static int usage(void) {
    fprintf(stderr, "usage: godwit-witness run --memory-mib N --file F [--signs T] | "
                    "status [--reset] | check --file F\n");
    return 2;
}

int main(int argc, char **argv) {
    const char *file = NULL, *terminal = NULL;
    uint64_t memory_mib = 0;
    int reset = 0;
    if (argc < 2) return usage();
    for (int i = 2; i < argc; i++) {
        if (!strcmp(argv[i], "--file") && i + 1 < argc) {
            file = argv[++i];
        } else if (!strcmp(argv[i], "--signs") && i + 1 < argc) {
            terminal = argv[++i];
        } else if (!strcmp(argv[i], "--memory-mib") && i + 1 < argc) {
            char *end;
            memory_mib = strtoull(argv[++i], &end, 10);
            if (*end || memory_mib == 0 || memory_mib > 1024 * 1024) return usage();
        } else if (!strcmp(argv[i], "--reset")) {
            reset = 1;
        } else {
            return usage();
        }
    }
    if (!strcmp(argv[1], "run") && file && memory_mib) return run(memory_mib, file, terminal);
    if (!strcmp(argv[1], "status") && !file) return status(reset);
    if (!strcmp(argv[1], "check") && file) return check(file);
    return usage();
}

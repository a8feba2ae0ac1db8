/* A load generator: sends one prepared request over many connections, checks every answer to its end, and counts.
 *
 *     load port=8000 request=FILE connections=50 [spread_ms=500] [rate=25 phase_ms=10] [once=1] [events=250] [parts=1000] [seconds=300] [paused=1]
 *
 * The file holds one request, or `parts` requests of the same length, which are sent in turn.
 * Without `rate` the loop is closed: the connections start over `spread_ms`, and each sends its next request when an
 * answer is complete (with once=1 it stops there). With `rate` the loop is open: a request goes out every 1/rate seconds
 * whether or not the last one was answered, over idle connections first, and its latency counts from the time it was due,
 * so that a stall of the server is not hidden by requests that were never sent. `phase_ms` shifts the schedule, which is
 * aligned to the clock: several load generators can take turns.
 *
 * Every line on stdin is answered by one JSON line on stdout: counters since the start, latencies since the line before.
 * A line that begins with `p` pauses a closed loop, and its answer comes when the last open request is complete; `r` lets
 * all connections go on. With paused=1 nothing is sent before the first `r`. The end of stdin ends the program.
 *
 * An answer is complete if its status is 200, its body ended as its framing says, and
 * either `events` were received and the last one was `data: [DONE]`, or, for events=0, the body ends with `}`.
 * `first` is the time to the first byte of the body: gateways differ in when they send the headers. `gap` is the time
 * between two parts of a streamed body.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_MAX = 16384, SAMPLES_MAX = 1 << 20, CONNECTIONS_MAX = 16384, LAST = 14 };
enum { CHUNK_SIZE = -1, CHUNK_END = -2, TRAILER = -3 };    /* what a chunked body expects next, if not data */

typedef struct {
    int fd, busy, waiting_for_room, got_first, head_length, in_body, chunked;
    int status, line_length;    /* line_length: bytes of the chunk-size or trailer line read so far */
    long left;                  /* bytes left in the body or in this chunk, or one of the states above */
    long size, sent, events, body_bytes;
    const char *request;
    double start, last_read;    /* last_read: when a part of a streamed body last came */
    char last[LAST];            /* the last bytes of the body */
    char head[HEAD_MAX + 1];
} Connection;

static struct { long port, connections, spread_ms, rate, phase_ms, once, events, parts, seconds, paused; char request[512]; } options =
    {.connections = 1, .parts = 1, .seconds = 600};
static Connection *connections;
static int *idle, idle_count, epoll_fd, timer_fd, open_answers, report_when_idle;
static char *requests_file;
static long request_length, next_part, starts, requests, events, failed;
static double next_start, interval, *latency, *first, *gap;
static long latency_count, first_count, gap_count;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void complain(const Connection *c, const char *why) {
    if (failed++ < 5) fprintf(stderr, "load: port %ld: %s: %.300s\n", options.port, why, c->head_length ? c->head : "(no answer)");
}

static void disconnect(Connection *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
}

/* The request follows when the socket can be written to: a full backlog may hold a connection up, but not the others. */
static int begin_connecting(Connection *c) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(options.port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (c->fd < 0 || (connect(c->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS)) return -1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    c->waiting_for_room = 0;
    struct epoll_event e = {.events = EPOLLIN, .data.u32 = c - connections};
    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &e);
}

static void watch(Connection *c, int for_room) {
    struct epoll_event e = {.events = EPOLLIN | (for_room ? EPOLLOUT : 0), .data.u32 = c - connections};
    if (c->waiting_for_room != for_room) epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
    c->waiting_for_room = for_room;
}

static int send_request(Connection *c) {
    while (c->sent < request_length) {
        ssize_t n = send(c->fd, c->request + c->sent, request_length - c->sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) { watch(c, 1); return 0; }
        if (n < 0) return -1;
        c->sent += n;
    }
    watch(c, 0);
    return 0;
}

static void release(Connection *c) {
    open_answers -= c->got_first;
    c->busy = c->got_first = 0;
    idle[idle_count++] = c - connections;
}

static void fail(Connection *c, const char *why) {
    complain(c, why);
    disconnect(c);
    release(c);
}

static void start_request(double due) {
    if (!idle_count) { failed++; return; }
    Connection *c = &connections[idle[--idle_count]];
    c->busy = 1;
    c->got_first = c->in_body = c->head_length = 0;
    c->sent = c->events = c->body_bytes = 0;
    c->start = due;
    c->request = requests_file + next_part++ % options.parts * request_length;
    if ((c->fd < 0 && begin_connecting(c) < 0) || send_request(c) < 0) fail(c, strerror(errno));
}

static void finish(Connection *c) {
    int whole = c->status == 200 && (options.events > 0
        ? c->events >= options.events && !memcmp(c->last, "data: [DONE]\n\n", LAST) : c->last[LAST - 1] == '}');
    if (!whole) { fail(c, "not a complete answer"); return; }
    requests++;
    if (latency_count < SAMPLES_MAX) latency[latency_count++] = now() - c->start;
    release(c);
    if (!options.rate && !options.once && !options.paused) start_request(now());
}

static void take_body(Connection *c, const char *data, long n) {
    if (options.events) {
        double read = now();
        if (c->got_first && gap_count < SAMPLES_MAX) gap[gap_count++] = read - c->last_read;
        c->last_read = read;
    }
    if (!c->got_first) {
        c->got_first = 1;
        open_answers++;
        if (first_count < SAMPLES_MAX) first[first_count++] = now() - c->start;
    }
    char before = c->body_bytes ? c->last[LAST - 1] : 0;
    for (const char *p = data, *end = data + n; (p = memchr(p, '\n', end - p)); p++)
        if ((p == data ? before : p[-1]) == '\n') c->events++, events++;
    if (n >= LAST) memcpy(c->last, data + n - LAST, LAST);
    else memmove(c->last, c->last + n, LAST - n), memcpy(c->last + LAST - n, data, n);
    c->body_bytes += n;
}

/* One byte of a chunk-size line, of the line end after a chunk, or of the trailer; true at the end of the answer. */
static int take_framing(Connection *c, char byte) {
    if (byte == '\r') return 0;
    if (byte != '\n') {
        c->line_length++;
        if (c->left == CHUNK_SIZE && byte != ';') c->size = c->size * 16 + (byte <= '9' ? byte - '0' : (byte | 32) - 'a' + 10);
        return 0;
    }
    int empty = c->line_length == 0;
    c->line_length = 0;
    if (c->left == TRAILER) return empty;
    if (c->left == CHUNK_END) c->left = CHUNK_SIZE;
    else c->left = c->size ? c->size : TRAILER;
    c->size = 0;
    return 0;
}

/* True when the answer is complete. */
static int take_data(Connection *c, const char *data, long n) {
    while (n > 0) {
        if (c->left > 0) {
            long part = n < c->left ? n : c->left;
            take_body(c, data, part);
            data += part, n -= part, c->left -= part;
            if (c->left == 0 && !c->chunked) return 1;
            if (c->left == 0) c->left = CHUNK_END;
        } else {
            n--;
            if (take_framing(c, *data++)) return 1;
        }
    }
    return 0;
}

static int take_head(Connection *c, const char *data, long n) {
    long room = HEAD_MAX - c->head_length, take = n < room ? n : room;
    memcpy(c->head + c->head_length, data, take);
    c->head[c->head_length + take] = 0;
    char *end = strstr(c->head, "\r\n\r\n");
    long before = c->head_length;
    c->head_length += take;
    if (!end) return room == take ? -1 : 0;
    char *length = strcasestr(c->head, "\r\ncontent-length:");
    c->status = atoi(c->head + 9);
    c->in_body = 1;
    c->chunked = !length || length > end;
    c->left = c->chunked ? CHUNK_SIZE : atol(length + 17);
    c->size = c->line_length = 0;
    long used = end + 4 - c->head - before;
    return (c->left == 0) || take_data(c, data + used, n - used);
}

static void receive(Connection *c) {
    static char data[1 << 18];
    ssize_t n = recv(c->fd, data, sizeof data, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0 || !c->busy) {    /* the other side may close a connection that is idle */
        if (c->busy) fail(c, "connection closed");
        else disconnect(c);
        return;
    }
    int done = c->in_body ? take_data(c, data, n) : take_head(c, data, n);
    if (done < 0) fail(c, "headers too long");
    if (done > 0) finish(c);
}

static void arm_timer(void) {
    struct itimerspec at = {.it_value = {(time_t)next_start, (long)((next_start - (time_t)next_start) * 1e9)}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &at, NULL);
}

static void start_due(void) {
    long expirations;
    if (read(timer_fd, &expirations, sizeof expirations) < 0) return;
    while (next_start <= now() && (options.rate || starts < options.connections)) {
        start_request(options.rate ? next_start : now());
        starts++;
        next_start += interval;
    }
    if (options.rate || starts < options.connections) arm_timer();
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_times(const char *name, double *samples, long n) {
    qsort(samples, n, sizeof *samples, ascending);
    printf(", \"%s_us\": [", name);    /* at most 2,000 of them, evenly spaced, the largest included */
    long step = n > 2000 ? n / 2000 : 1;
    for (long i = (n - 1) % step; n && i < n; i += step) printf("%s%.0f", i >= step ? "," : "", samples[i] * 1e6);
    printf("]");
}

static void report(void) {
    printf("{\"requests\": %ld, \"events\": %ld, \"failed\": %ld, \"open\": %d", requests, events, failed, open_answers);
    print_times("latency", latency, latency_count);
    print_times("first", first, first_count);
    print_times("gap", gap, gap_count);
    printf("}\n");
    fflush(stdout);
    latency_count = first_count = gap_count = report_when_idle = 0;
}

static int take_command(void) {
    char line[256];
    if (read(0, line, sizeof line) <= 0) return 0;
    if (line[0] == 'p') options.paused = report_when_idle = 1;
    if (line[0] == 'r') {
        options.paused = 0;
        for (int n = idle_count; n > 0; n--) start_request(now());
    }
    if (!report_when_idle) report();
    return 1;
}

static void read_options(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        char *a = argv[i];
        if (sscanf(a, "port=%ld", &options.port) || sscanf(a, "connections=%ld", &options.connections)
            || sscanf(a, "spread_ms=%ld", &options.spread_ms) || sscanf(a, "rate=%ld", &options.rate)
            || sscanf(a, "phase_ms=%ld", &options.phase_ms) || sscanf(a, "once=%ld", &options.once)
            || sscanf(a, "events=%ld", &options.events) || sscanf(a, "seconds=%ld", &options.seconds) || sscanf(a, "parts=%ld", &options.parts)
            || sscanf(a, "paused=%ld", &options.paused)
            || sscanf(a, "request=%511s", options.request)) continue;
        fprintf(stderr, "load: what is %s?\n", a);
        exit(2);
    }
    if (options.connections > CONNECTIONS_MAX) options.connections = CONNECTIONS_MAX;
    FILE *file = fopen(options.request, "rb");
    struct stat about;
    if (!file || fstat(fileno(file), &about)) { perror(options.request); exit(2); }
    requests_file = malloc(about.st_size);
    request_length = fread(requests_file, 1, about.st_size, file) / options.parts;
    fclose(file);
}

static void set_up(void) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_PDEATHSIG, SIGKILL);    /* neither outlives the bench ... */
    alarm(options.seconds);              /* ... nor its time */

    connections = calloc(options.connections, sizeof *connections);
    idle = malloc(options.connections * sizeof *idle);
    latency = malloc(SAMPLES_MAX * sizeof *latency);
    first = malloc(SAMPLES_MAX * sizeof *first);
    gap = malloc(SAMPLES_MAX * sizeof *gap);
    for (long i = options.connections - 1; i >= 0; i--) {
        connections[i].fd = -1;
        idle[idle_count++] = i;
    }
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    struct epoll_event stdin_event = {.events = EPOLLIN, .data.u32 = CONNECTIONS_MAX};
    struct epoll_event timer_event = {.events = EPOLLIN, .data.u32 = CONNECTIONS_MAX + 1};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, 0, &stdin_event);
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &timer_event);
    interval = options.rate ? 1.0 / options.rate : options.spread_ms / 1e3 / options.connections;
    next_start = now();
    if (options.rate) next_start = ((long)(next_start / interval) + 2) * interval + options.phase_ms / 1e3;
    if (!options.paused) arm_timer();
}

int main(int argc, char **argv) {
    struct epoll_event ready[256];
    read_options(argc, argv);
    set_up();
    for (;;) {
        int n = epoll_wait(epoll_fd, ready, 256, -1);
        for (int i = 0; i < n; i++) {
            unsigned which = ready[i].data.u32;
            if (which == CONNECTIONS_MAX) { if (!take_command()) return 0; continue; }
            if (which == CONNECTIONS_MAX + 1) { start_due(); continue; }
            Connection *c = &connections[which];
            if (c->fd >= 0 && c->busy && ready[i].events & EPOLLOUT && send_request(c) < 0) { fail(c, strerror(errno)); continue; }
            if (c->fd >= 0 && ready[i].events & ~EPOLLOUT) receive(c);
        }
        if (report_when_idle && idle_count == options.connections) report();
    }
}

/* A scripted model server: answers chat completions from memory, at a chosen pace, for next to no CPU.
 *
 *     upstream port=8001 seconds=300
 *
 * One thread, one epoll loop, HTTP/1.1 with keep-alive. The request says what it wants in its text, since the text is
 * what every gateway passes on unchanged: "[events=250 pace_ms=20]" within the first 16 KB asks for 250 SSE events, one
 * every 20 ms; pace_ms=0 asks for all of them as fast as the socket takes them; events=0, or no such mark, for one JSON
 * answer. Every event is its own HTTP chunk. A streamed answer ends with a finish event, a usage event with
 * `choices: []` and `data: [DONE]`. The first event goes out at once, the second after a random part of the pace: streams
 * that began together do not tick together.
 *
 * Not here, because no contestant sends it: chunked request bodies, pipelining, Expect.
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
#include <time.h>
#include <unistd.h>

enum { HEAD_MAX = 16384, TAIL_MAX = 2048, BLOCK_EVENTS = 1024, SLOTS = 1024, FDS_MAX = 65536 };

typedef struct connection {
    int fd;
    int length;          /* bytes in `head` */
    long body_left;      /* bytes of the request's body still to come; -1 while its headers are incomplete */
    long events, pace_ms;
    long position;       /* bytes of the answer already sent */
    long limit;          /* bytes of the answer that may be sent by now */
    long total;          /* bytes of the answer; 0 while there is none */
    int prefix_length, tail_length, waiting_for_room;
    int slot;            /* place in the timer wheel, -1: none */
    struct connection *next, *previous;
    char prefix[1024], tail[TAIL_MAX];
    char head[HEAD_MAX + 1];
} Connection;

static Connection *connections[FDS_MAX];
static Connection *wheel[SLOTS];    /* one slot a millisecond: a stream stands in the slot of its next event */
static long now_ms, ticking;        /* ticking: how many streams stand in the wheel */
static char *block;                 /* BLOCK_EVENTS events of the same length */
static int event_length, epoll_fd;

static const char EVENT[] =
    "data: {\"choices\":[{\"finish_reason\":null,\"index\":0,\"delta\":{\"content\":\" %04d\"}}],\"created\":1763827200,"
    "\"id\":\"chatcmpl-kqB1zXw0bX3qT9yJ7mC5vN2hL8pR4sDf\",\"model\":\"bench\",\"system_fingerprint\":\"b7120-a1b2c3d4e\","
    "\"object\":\"chat.completion.chunk\"}\n\n";
static const char STREAM_HEAD[] =
    "HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
static const char ANSWER[] =
    "{\"choices\":[{\"finish_reason\":\"stop\",\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"The answer is "
    "forty-two, and here is one more sentence.\"}}],\"created\":1763827200,\"model\":\"bench\",\"system_fingerprint\":"
    "\"b7120-a1b2c3d4e\",\"object\":\"chat.completion\",\"usage\":{\"completion_tokens\":16,\"prompt_tokens\":60,"
    "\"total_tokens\":76},\"id\":\"chatcmpl-kqB1zXw0bX3qT9yJ7mC5vN2hL8pR4sDf\"}";

static long monotonic_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int put_chunk(char *to, const char *data) {
    return sprintf(to, "%zx\r\n%s\r\n", strlen(data), data);
}

static void build_block(void) {
    char event[1024], one[2048];
    for (int i = 0; i < BLOCK_EVENTS; i++) {    /* the tokens differ: LiteLLM refuses a model that repeats itself */
        sprintf(event, EVENT, i);
        event_length = put_chunk(one, event);
        if (i == 0) block = malloc((size_t)event_length * BLOCK_EVENTS);
        memcpy(block + (size_t)i * event_length, one, event_length);
    }
}

static void build_tail(Connection *c) {
    char event[1024];
    int n = put_chunk(c->tail, "data: {\"choices\":[{\"finish_reason\":\"stop\",\"index\":0,\"delta\":{}}],\"created\":1763827200,"
        "\"id\":\"chatcmpl-kqB1zXw0bX3qT9yJ7mC5vN2hL8pR4sDf\",\"model\":\"bench\",\"object\":\"chat.completion.chunk\"}\n\n");
    sprintf(event, "data: {\"choices\":[],\"created\":1763827200,\"id\":\"chatcmpl-kqB1zXw0bX3qT9yJ7mC5vN2hL8pR4sDf\","
        "\"model\":\"bench\",\"object\":\"chat.completion.chunk\",\"usage\":{\"completion_tokens\":%ld,\"prompt_tokens\":60,"
        "\"total_tokens\":%ld}}\n\n", c->events, c->events + 60);
    n += put_chunk(c->tail + n, event);
    n += put_chunk(c->tail + n, "data: [DONE]\n\n");
    c->tail_length = n + sprintf(c->tail + n, "0\r\n\r\n");
}

static void leave_wheel(Connection *c) {
    if (c->slot < 0) return;
    if (c->previous) c->previous->next = c->next; else wheel[c->slot] = c->next;
    if (c->next) c->next->previous = c->previous;
    c->slot = -1;
    ticking--;
}

static void enter_wheel(Connection *c, long in_ms) {
    c->slot = (now_ms + (in_ms < 1 ? 1 : in_ms >= SLOTS ? SLOTS - 1 : in_ms)) % SLOTS;
    c->previous = NULL;
    c->next = wheel[c->slot];
    if (c->next) c->next->previous = c;
    wheel[c->slot] = c;
    ticking++;
}

static void close_connection(Connection *c) {
    leave_wheel(c);
    connections[c->fd] = NULL;
    close(c->fd);
    free(c);
}

static void watch(Connection *c, int for_room) {
    struct epoll_event e = {.events = EPOLLIN | (for_room ? EPOLLOUT : 0), .data.fd = c->fd};
    if (c->waiting_for_room != for_room) epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
    c->waiting_for_room = for_room;
}

/* The answer is prefix, events, tail; `position` says where we are in it, so that nothing needs to be buffered. */
static int send_up_to_limit(Connection *c) {
    long events_end = c->prefix_length + c->events * event_length;
    while (c->position < c->limit) {
        const char *from;
        long end;
        if (c->position < c->prefix_length) {
            from = c->prefix + c->position;
            end = c->prefix_length;
        } else if (c->position < events_end) {
            long into = (c->position - c->prefix_length) % event_length;
            from = block + into;
            end = c->position - into + (long)event_length * BLOCK_EVENTS;
            if (end > events_end) end = events_end;
        } else {
            from = c->tail + (c->position - events_end);
            end = c->total;
        }
        if (end > c->limit) end = c->limit;
        ssize_t n = send(c->fd, from, end - c->position, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) { watch(c, 1); return 0; }
        if (n < 0) return -1;
        c->position += n;
    }
    watch(c, 0);
    if (c->position == c->total) c->total = c->length = 0, c->body_left = -1;
    return 0;
}

static int begin_answer(Connection *c) {
    char *mark = strstr(c->head, "[events=");
    c->events = c->pace_ms = 0;
    if (mark) sscanf(mark, "[events=%ld pace_ms=%ld]", &c->events, &c->pace_ms);
    if (c->events <= 0) {
        c->events = 0;
        c->tail_length = 0;
        c->prefix_length = sprintf(c->prefix, "HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Type: application/json\r\n"
                                   "Content-Length: %zu\r\n\r\n%s", sizeof ANSWER - 1, ANSWER);
    } else {
        memcpy(c->prefix, STREAM_HEAD, c->prefix_length = sizeof STREAM_HEAD - 1);
        build_tail(c);
    }
    c->position = 0;
    c->limit = c->total = c->prefix_length + c->events * event_length + c->tail_length;
    if (c->events > 0 && c->pace_ms > 0) {
        c->limit = c->prefix_length + event_length;
        enter_wheel(c, 1 + random() % c->pace_ms);
    }
    return send_up_to_limit(c);
}

static int take_request(Connection *c) {
    static char rest[1 << 20];
    for (;;) {
        int into_head = c->length < HEAD_MAX;
        ssize_t n = into_head ? recv(c->fd, c->head + c->length, HEAD_MAX - c->length, 0) : recv(c->fd, rest, sizeof rest, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN)) return -1;
        if (n < 0) return 0;
        if (into_head) c->head[c->length += n] = 0;
        if (c->body_left < 0) {
            char *end = strstr(c->head, "\r\n\r\n"), *length = strcasestr(c->head, "\r\ncontent-length:");
            if (!end && !into_head) return -1;
            if (!end) continue;
            c->body_left = length && length < end ? atol(length + 17) : 0;
            n = c->head + c->length - (end + 4);
        }
        c->body_left -= n;
        if (c->body_left <= 0) return begin_answer(c);
    }
}

static void tick(void) {
    long until = monotonic_ms();
    for (; now_ms < until; ) {
        now_ms++;
        for (Connection *c = wheel[now_ms % SLOTS], *next; c; c = next) {
            next = c->next;
            leave_wheel(c);
            c->limit += event_length;
            if (c->limit > c->prefix_length + c->events * event_length) c->limit = c->total;
            else enter_wheel(c, c->pace_ms);
            if (send_up_to_limit(c) < 0) close_connection(c);
        }
    }
}

static void accept_all(int listener) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        if (fd >= FDS_MAX) { close(fd); continue; }
        Connection *c = calloc(1, sizeof *c);
        c->fd = fd, c->slot = -1, c->body_left = -1;
        connections[fd] = c;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
    }
}

static int open_listener(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) { perror("upstream: listen"); exit(1); }
    return fd;
}

int main(int argc, char **argv) {
    long port = 0, seconds = 600;
    for (int i = 1; i < argc; i++) sscanf(argv[i], "port=%ld", &port), sscanf(argv[i], "seconds=%ld", &seconds);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_PDEATHSIG, SIGKILL);    /* neither outlives the bench ... */
    alarm(seconds);                      /* ... nor its time */

    build_block();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int listener = open_listener(port);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listener}, ready[256];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &e);
    now_ms = monotonic_ms();
    for (;;) {
        int n = epoll_wait(epoll_fd, ready, 256, ticking ? 1 : 1000);
        tick();
        for (int i = 0; i < n; i++) {
            Connection *c = connections[ready[i].data.fd];
            if (ready[i].data.fd == listener) { accept_all(listener); continue; }
            if (!c) continue;
            int broken = ready[i].events & (EPOLLERR | EPOLLHUP);
            if (!broken && ready[i].events & EPOLLOUT) broken = send_up_to_limit(c) < 0;
            if (!broken && ready[i].events & EPOLLIN) broken = take_request(c) < 0;
            if (broken) close_connection(c);
        }
    }
}

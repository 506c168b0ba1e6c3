/* See http.h. Each connection is a state machine: reading a request, waiting out a delay, writing the answer. */
#define _GNU_SOURCE
#include "http.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_CONNECTIONS = 1024,
    MAX_HEAD = 8192,          /* request line and headers */
    MAX_BODY = 1 << 20,       /* read and thrown away */
    IDLE_MS = 75000,          /* between requests on one connection */
    REQUEST_MS = 15000,       /* from a request's first byte to its last, and for taking the answer */
    LINGER_MS = 8000,         /* after SIGTERM, for what was begun */
};

enum state { READING, SKIPPING, WAITING, WRITING, CLOSING };

struct connection {
    int fd;
    enum state state;
    char in[MAX_HEAD + 1];
    size_t have;
    size_t skip;              /* body bytes still to throw away */
    char *out;
    size_t out_length, out_sent;
    int close_after;
    long long deadline;       /* when the connection is dropped, or when WAITING ends */
};

static struct connection *connections[MAX_CONNECTIONS];
static int count;
static volatile sig_atomic_t stopping;
static int wake[2];
static const char *version;
static handler *handle;

static long long now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

static void on_stop(int signal)
{
    (void)signal;
    int saved = errno;
    stopping = 1;
    if (write(wake[1], "x", 1) < 0) { /* full: poll wakes anyway */ }
    errno = saved;
}

void body_printf(struct response *response, const char *format, ...)
{
    va_list arguments;
    size_t room = sizeof response->body - response->length;
    va_start(arguments, format);
    int length = vsnprintf(response->body + response->length, room, format, arguments);
    va_end(arguments);
    if (length > 0)
        response->length += (size_t)length < room ? (size_t)length : room - 1;
}

static const char *reason(int status)
{
    switch (status) {
    case 200: return "OK";
    case 400: return "Bad Request";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 411: return "Length Required";
    case 413: return "Content Too Large";
    case 431: return "Request Header Fields Too Large";
    case 500: return "Internal Server Error";
    case 503: return "Service Unavailable";
    default: return "Unknown";
    }
}

static void answer(struct connection *c, const struct response *response, int is_head)
{
    size_t room = response->length + 512;
    c->out = malloc(room);
    if (!c->out) {
        c->state = CLOSING;
        return;
    }
    int head = snprintf(c->out, room,
        "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\nCache-Control: no-store\r\n"
        "X-App-Version: %s\r\nConnection: %s\r\n\r\n",
        response->status, reason(response->status), response->type, response->length, version,
        c->close_after ? "close" : "keep-alive");
    c->out_length = (size_t)head;
    if (!is_head) {
        memcpy(c->out + head, response->body, response->length);
        c->out_length += response->length;
    }
    c->out_sent = 0;
    long long now = now_ms();
    if (response->delay_ms > 0) {
        c->state = WAITING;
        c->deadline = now + response->delay_ms;
    } else {
        c->state = WRITING;
        c->deadline = now + REQUEST_MS;
    }
}

static void refuse(struct connection *c, int status)
{
    static struct response response;
    response = (struct response){ .status = status, .type = "text/plain; charset=utf-8" };
    body_printf(&response, "%s\n", reason(status));
    c->close_after = 1;
    answer(c, &response, 0);
}

/* Whether a comma-separated header value holds the word. */
static int has_word(const char *value, const char *word)
{
    size_t length = strlen(word);
    while (*value) {
        value += strspn(value, " \t,");
        size_t item = strcspn(value, " \t,;");
        if (item == length && !strncasecmp(value, word, length))
            return 1;
        value += strcspn(value, ",");
    }
    return 0;
}

/* Takes one request off the front of the input, if a whole head is there. */
static void parse(struct connection *c)
{
    static struct response response;
    c->in[c->have] = '\0';
    char *end = memmem(c->in, c->have, "\r\n\r\n", 4);
    if (!end) {
        if (c->have == MAX_HEAD)
            refuse(c, 431);
        return;
    }
    size_t head = (size_t)(end - c->in) + 4;
    end[2] = '\0';
    char *line = c->in, *next = strstr(line, "\r\n");
    *next = '\0';
    char *method = strtok(line, " "), *target = strtok(NULL, " "), *protocol = strtok(NULL, " ");
    if (!method || !target || !protocol || strtok(NULL, " ") || strncmp(protocol, "HTTP/1.", 7) || target[0] != '/') {
        refuse(c, 400);
        return;
    }
    int keep = strcmp(protocol, "HTTP/1.0") != 0, chunked = 0;
    long long body = 0;
    for (line = next + 2; *line; line = next + 2) {
        next = strstr(line, "\r\n");
        if (!next)
            break;
        *next = '\0';
        char *colon = strchr(line, ':');
        if (!colon) {
            refuse(c, 400);
            return;
        }
        *colon = '\0';
        char *value = colon + 1 + strspn(colon + 1, " \t");
        if (!strcasecmp(line, "content-length")) {
            char *rest;
            errno = 0;
            body = strtoll(value, &rest, 10);
            rest += strspn(rest, " \t");
            if (errno || *rest || rest == value || body < 0 || !isdigit((unsigned char)*value)) {
                refuse(c, 400);
                return;
            }
        } else if (!strcasecmp(line, "transfer-encoding")) {
            chunked = 1;
        } else if (!strcasecmp(line, "connection")) {
            if (has_word(value, "close"))
                keep = 0;
            else if (has_word(value, "keep-alive"))
                keep = 1;
        }
    }
    if (chunked || body > MAX_BODY) {
        refuse(c, chunked ? 411 : 413);
        return;
    }
    c->close_after = !keep || stopping;
    char *query = strchr(target, '?');
    if (query)
        *query++ = '\0';
    struct request request = { method, target, query ? query : "" };
    response = (struct response){ .status = 200, .type = "application/json" };
    int is_head = !strcmp(method, "HEAD");
    if (!is_head && strcmp(method, "GET") && strcmp(method, "POST")) {
        response.status = 405;
        body_printf(&response, "{\"detail\":\"only GET, HEAD and POST\"}\n");
    } else {
        handle(&request, &response);
    }
    answer(c, &response, is_head);
    /* What is behind the head: first the body, which is thrown away, then perhaps the next request. */
    c->have -= head;
    memmove(c->in, c->in + head, c->have);
    size_t here = c->have < (size_t)body ? c->have : (size_t)body;
    c->have -= here;
    memmove(c->in, c->in + here, c->have);
    c->skip = (size_t)body - here;
}

static void close_connection(int index)
{
    struct connection *c = connections[index];
    close(c->fd);
    free(c->out);
    free(c);
    connections[index] = connections[--count];
}

static void finish_answer(struct connection *c)
{
    free(c->out);
    c->out = NULL;
    c->state = c->close_after ? CLOSING : c->skip ? SKIPPING : READING;
    c->deadline = now_ms() + (c->have || c->skip ? REQUEST_MS : IDLE_MS);
    if (c->state == CLOSING)
        shutdown(c->fd, SHUT_WR);
}

static void on_readable(struct connection *c)
{
    char dropped[4096];
    if (c->state == READING) {
        ssize_t got = recv(c->fd, c->in + c->have, MAX_HEAD - c->have, 0);
        if (got > 0) {
            if (!c->have)
                c->deadline = now_ms() + REQUEST_MS;
            c->have += (size_t)got;
            parse(c);
        } else if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
            c->state = CLOSING;
        }
    } else if (c->state == SKIPPING) {
        size_t want = c->skip < sizeof dropped ? c->skip : sizeof dropped;
        ssize_t got = recv(c->fd, dropped, want, 0);
        if (got > 0) {
            c->skip -= (size_t)got;
            if (!c->skip)
                c->state = READING;
        } else if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
            c->state = CLOSING;
        }
    }
}

static void on_writable(struct connection *c)
{
    ssize_t sent = send(c->fd, c->out + c->out_sent, c->out_length - c->out_sent, MSG_NOSIGNAL);
    if (sent > 0) {
        c->out_sent += (size_t)sent;
        if (c->out_sent == c->out_length)
            finish_answer(c);
    } else if (sent < 0 && errno != EAGAIN && errno != EINTR) {
        c->state = CLOSING;
    }
}

static void accept_all(int listener)
{
    while (count < MAX_CONNECTIONS) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0)
            return;
        struct connection *c = calloc(1, sizeof *c);
        if (!c) {
            close(fd);
            return;
        }
        int on = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        c->fd = fd;
        c->deadline = now_ms() + REQUEST_MS;
        connections[count++] = c;
    }
}

int serve(int port, const char *app_version, handler *app_handle)
{
    version = app_version;
    handle = app_handle;
    struct sigaction action = { .sa_handler = on_stop };
    if (pipe2(wake, O_NONBLOCK | O_CLOEXEC)) {
        perror("pipe");
        return 1;
    }
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((unsigned short)port) };
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 511)) {
        perror("listen");
        return 1;
    }
    printf("version %s listens on port %d\n", version, port);
    fflush(stdout);
    static struct pollfd polled[MAX_CONNECTIONS + 2];
    long long last_moment = 0;
    for (;;) {
        long long now = now_ms(), soonest = LLONG_MAX;
        if (stopping && !last_moment) {
            last_moment = now + LINGER_MS;
            /* What is in the listener's queue was accepted by the kernel: it gets its answer. */
            accept_all(listener);
            close(listener);
            listener = -1;
        }
        for (int i = 0; i < count; i++) {
            struct connection *c = connections[i];
            if (c->state == WAITING && c->deadline <= now) {
                c->state = WRITING;
                c->deadline = now + REQUEST_MS;
            }
            /* A pipelined request may be complete already. */
            if (c->state == READING && c->have)
                parse(c);
            int is_idle = c->state == READING && !c->have;
            if (c->state == CLOSING || c->deadline <= now || (last_moment && (now >= last_moment || (is_idle && c->out_length)))) {
                close_connection(i--);
                continue;
            }
            if (c->deadline < soonest)
                soonest = c->deadline;
        }
        if (last_moment) {
            if (!count || now >= last_moment) {
                printf("version %s ends\n", version);
                return 0;
            }
            if (last_moment < soonest)
                soonest = last_moment;
        }
        polled[0] = (struct pollfd){ .fd = count < MAX_CONNECTIONS ? listener : -1, .events = POLLIN };
        polled[1] = (struct pollfd){ .fd = stopping && last_moment ? -1 : wake[0], .events = POLLIN };
        for (int i = 0; i < count; i++) {
            enum state state = connections[i]->state;
            short events = state == WRITING ? POLLOUT : state == WAITING ? 0 : POLLIN;
            polled[i + 2] = (struct pollfd){ .fd = connections[i]->fd, .events = events };
        }
        long long wait = soonest == LLONG_MAX ? -1 : soonest - now;
        int served = count, timeout = wait > INT_MAX ? INT_MAX : wait < 0 ? -1 : (int)wait + 1;
        if (poll(polled, (nfds_t)served + 2, timeout) < 0 && errno != EINTR) {
            perror("poll");
            return 1;
        }
        for (int i = 0; i < served; i++) {
            short events = polled[i + 2].revents;
            struct connection *c = connections[i];
            if (!events)
                continue;
            if (events & POLLOUT)
                on_writable(c);
            else if (events & (POLLIN | POLLHUP | POLLERR)) {
                if (c->state == READING || c->state == SKIPPING)
                    on_readable(c);
                else
                    c->state = CLOSING;
            }
        }
        if (polled[0].revents)
            accept_all(listener);
    }
}

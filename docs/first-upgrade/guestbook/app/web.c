/* The guestbook's pages: rows, uploads, and a WebSocket that says everything twice. A process for each connection. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *version, *schema, *page;
static volatile sig_atomic_t stopping;

static void on_stop(int signal) { (void)signal; stopping = 1; }

static int write_all(int fd, const void *data, size_t length)
{
    for (const char *at = data; length;) {
        ssize_t n = write(fd, at, length);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return -1;
        at += n;
        length -= (size_t)n;
    }
    return 0;
}

/* One line to the database, its whole answer back: bytes, or -1. */
static ssize_t ask_db(const char *line, char *answer, size_t room)
{
    struct addrinfo hints = { .ai_family = AF_INET, .ai_socktype = SOCK_STREAM }, *found;
    if (getaddrinfo("db", "5432", &hints, &found)) return -1;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct timeval limit = { .tv_sec = 5 };
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    ssize_t got = -1;
    if (!connect(fd, found->ai_addr, found->ai_addrlen) && !write_all(fd, line, strlen(line))) {
        shutdown(fd, SHUT_WR);
        size_t have = 0;
        ssize_t n;
        while (have + 1 < room && (n = read(fd, answer + have, room - 1 - have)) > 0) have += (size_t)n;
        answer[have] = '\0';
        got = (ssize_t)have;
    }
    freeaddrinfo(found);
    close(fd);
    return got;
}

static void reply(int fd, const char *status, const char *body, size_t length)
{
    char head[512];
    int n = snprintf(head, sizeof head, "HTTP/1.1 %s\r\nContent-Length: %zu\r\nX-App-Version: %s\r\nConnection: close\r\n\r\n",
                     status, length, version);
    if (!write_all(fd, head, (size_t)n)) write_all(fd, body, length);
}

static void say(int fd, const char *status, const char *text) { reply(fd, status, text, strlen(text)); }

/* Whether the row is safe: only then the client is told so. */
static void add(int fd, const char *text)
{
    char line[1024], answer[256];
    snprintf(line, sizeof line, "add %s %s\n", schema, text);
    if (ask_db(line, answer, sizeof answer) < 0) say(fd, "503 Service Unavailable", "no database\n");
    else if (strcmp(answer, "ok\n")) say(fd, "503 Service Unavailable", answer);
    else say(fd, "201 Created", "ok\n");
}

static int is_name(const char *name)
{
    size_t length = strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_");
    return length > 0 && length < 100 && !name[length];
}

/* A new name, complete or not at all, on the disk before it is told. */
static void upload(int fd, const char *name, const char *body, size_t length)
{
    char path[256], part[300], row[200];
    snprintf(path, sizeof path, "/uploads/%s", name);
    snprintf(part, sizeof part, "/uploads/.%s.%d", name, (int)getpid());
    int file = open(part, O_WRONLY | O_CREAT | O_EXCL, 0644);
    int failed = file < 0 || write_all(file, body, length) || fsync(file) || rename(part, path);
    if (file >= 0) close(file);
    snprintf(row, sizeof row, "upload %s", name);
    if (failed) say(fd, "503 Service Unavailable", "the file is not kept\n");
    else add(fd, row);
}

static void send_file(int fd, const char *path)
{
    static char body[1 << 20];
    int file = open(path, O_RDONLY);
    ssize_t n = file < 0 ? -1 : read(file, body, sizeof body);
    if (n < 0) say(fd, strncmp(path, "/uploads/", 9) ? "500 Internal Server Error" : "404 Not Found", "there is no such file\n");
    else reply(fd, "200 OK", body, (size_t)n);
}

static uint32_t turn(uint32_t x, int by) { return x << by | x >> (32 - by); }

/* RFC 3174, for the at most 119 bytes that a handshake has. */
static void sha1(const char *text, unsigned char digest[20])
{
    uint32_t h[5] = { 0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0 };
    unsigned char message[128] = { 0 };
    size_t length = strlen(text), total = length + 9 <= 64 ? 64 : 128;
    memcpy(message, text, length);
    message[length] = 0x80;
    for (int i = 0; i < 4; i++) message[total - 1 - i] = (unsigned char)(length * 8 >> (8 * i));
    for (size_t block = 0; block < total; block += 64) {
        uint32_t w[80], a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
        for (int i = 0; i < 16; i++) {
            const unsigned char *m = message + block + 4 * i;
            w[i] = (uint32_t)m[0] << 24 | (uint32_t)m[1] << 16 | (uint32_t)m[2] << 8 | m[3];
        }
        for (int i = 16; i < 80; i++) w[i] = turn(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
        for (int i = 0; i < 80; i++) {
            uint32_t f = i < 20 ? (b & c) | (~b & d) : i < 40 ? b ^ c ^ d : i < 60 ? (b & c) | (b & d) | (c & d) : b ^ c ^ d;
            uint32_t k = i < 20 ? 0x5a827999 : i < 40 ? 0x6ed9eba1 : i < 60 ? 0x8f1bbcdc : 0xca62c1d6;
            uint32_t next = turn(a, 5) + f + e + k + w[i];
            e = d; d = c; c = turn(b, 30); b = a; a = next;
        }
        h[0] += a; h[1] += b; h[2] += c; h[3] += d; h[4] += e;
    }
    for (int i = 0; i < 20; i++) digest[i] = (unsigned char)(h[i / 4] >> (24 - 8 * (i % 4)));
}

static int read_all(int fd, void *data, size_t length)
{
    for (char *at = data; length;) {
        ssize_t n = read(fd, at, length);
        if (n <= 0) return -1;
        at += n;
        length -= (size_t)n;
    }
    return 0;
}

/* Echoes short frames, with the version before what was said. */
static void websocket(int fd, const char *key)
{
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char text[128], accept[29], head[256];
    unsigned char digest[21] = { 0 };
    snprintf(text, sizeof text, "%.60s258EAFA5-E914-47DA-95CA-C5AB0DC85B11", key);
    sha1(text, digest);
    for (int i = 0; i < 7; i++) {
        uint32_t three = (uint32_t)digest[3 * i] << 16 | (uint32_t)digest[3 * i + 1] << 8 | (i < 6 ? digest[3 * i + 2] : 0);
        for (int j = 0; j < 4; j++) accept[4 * i + j] = letters[three >> (18 - 6 * j) & 63];
    }
    accept[27] = '=';
    accept[28] = '\0';
    int n = snprintf(head, sizeof head, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     "Sec-WebSocket-Accept: %s\r\n\r\n", accept);
    if (write_all(fd, head, (size_t)n)) return;
    for (;;) {
        unsigned char start[6], said[128], out[256];
        if (read_all(fd, start, 6)) return;
        size_t length = start[1] & 127;
        if (!(start[1] & 128) || length > 125 || read_all(fd, said, length)) return;
        for (size_t i = 0; i < length; i++) said[i] ^= start[2 + i % 4];
        if ((start[0] & 15) == 8) return;
        int size = snprintf((char *)out + 2, 125, "%s %.*s", version, (int)(length < 90 ? length : 90), said);
        out[0] = 0x81;
        out[1] = (unsigned char)size;
        if (write_all(fd, out, (size_t)size + 2)) return;
    }
}

static void serve(int fd)
{
    static char in[1 << 17], rows[1 << 22];
    size_t have = 0;
    char *end = NULL;
    while (!end && have + 1 < sizeof in) {
        ssize_t n = read(fd, in + have, sizeof in - 1 - have);
        if (n <= 0) return;
        have += (size_t)n;
        in[have] = '\0';
        end = strstr(in, "\r\n\r\n");
    }
    char method[8], path[200];
    if (!end || sscanf(in, "%7s %199s", method, path) != 2) return say(fd, "400 Bad Request", "no\n");
    path[strcspn(path, "?")] = '\0';
    char *body = end + 4, *at = strcasestr(in, "\r\ncontent-length:"), *key = strcasestr(in, "\r\nsec-websocket-key:");
    size_t length = at && at < end ? strtoul(at + 17, NULL, 10) : 0;
    if (length >= sizeof in - (size_t)(body - in)) return say(fd, "413 Content Too Large", "too much\n");
    if (have < (size_t)(body - in) + length && read_all(fd, in + have, (size_t)(body - in) + length - have)) return;
    int is_get = !strcmp(method, "GET");
    if (is_get && !strcmp(path, "/ws") && key && key < end) {
        key += 20;
        key += strspn(key, " ");
        key[strcspn(key, "\r")] = '\0';
        websocket(fd, key);
    } else if (is_get && !strcmp(path, "/")) {
        send_file(fd, page);
    } else if (is_get && !strcmp(path, "/healthz")) {
        /* As good as what people see: the page, and a database that answers. */
        if (access(page, R_OK)) say(fd, "503 Service Unavailable", "the page is missing\n");
        else if (ask_db("dump\n", rows, sizeof rows) < 0) say(fd, "503 Service Unavailable", "no database\n");
        else say(fd, "200 OK", "ok\n");
    } else if (is_get && !strcmp(path, "/rows")) {
        ssize_t n = ask_db("dump\n", rows, sizeof rows);
        if (n < 0) say(fd, "503 Service Unavailable", "no database\n");
        else reply(fd, "200 OK", rows, (size_t)n);
    } else if (!strcmp(method, "POST") && !strcmp(path, "/rows")) {
        char row[120];
        snprintf(row, sizeof row, "%.*s", (int)(length < 100 ? length : 100), body);
        row[strcspn(row, "\r\n")] = '\0';
        char text[150];
        snprintf(text, sizeof text, "wrote %s", row);
        if (is_name(row)) add(fd, text);
        else say(fd, "400 Bad Request", "a row is one word\n");
    } else if (!strncmp(path, "/uploads/", 9) && is_name(path + 9)) {
        if (is_get) send_file(fd, path);
        else if (!strcmp(method, "PUT")) upload(fd, path + 9, body, length);
        else say(fd, "405 Method Not Allowed", "GET or PUT\n");
    } else {
        say(fd, "404 Not Found", "there is no such page\n");
    }
}

static const char *from_env(const char *name)
{
    const char *value = getenv(name);
    return value && *value ? value : "unset";
}

int main(void)
{
    version = from_env("APP_VERSION");
    schema = from_env("SCHEMA");
    page = from_env("PAGE");
    struct sigaction stop = { .sa_handler = on_stop };
    sigaction(SIGTERM, &stop, NULL);
    sigaction(SIGINT, &stop, NULL);
    signal(SIGPIPE, SIG_IGN);
    struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(8080) };
    int one = 1, listening = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listening, (struct sockaddr *)&here, sizeof here) || listen(listening, 128)) {
        perror("web: cannot listen on 8080");
        return 1;
    }
    while (!stopping) {
        int fd = accept(listening, NULL, NULL);
        while (waitpid(-1, NULL, WNOHANG) > 0) { }
        if (fd < 0) continue;
        if (!fork()) {
            signal(SIGTERM, SIG_DFL);
            close(listening);
            serve(fd);
            shutdown(fd, SHUT_WR);
            _exit(0);
        }
        close(fd);
    }
    /* What was begun ends first; the engine's grace is the bound. */
    close(listening);
    while (wait(NULL) > 0 || errno == EINTR) { }
    return 0;
}

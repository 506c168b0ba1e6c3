/* A small HTTP/1.1 server: one process, poll, keep-alive, pipelining, orderly end on SIGTERM. */
#ifndef HTTP_H
#define HTTP_H

#include <stddef.h>

struct request {
    const char *method;
    const char *path;  /* without the query */
    const char *query; /* "" when there is none */
};

struct response {
    int status;
    const char *type;
    char body[16384];
    size_t length;
    int delay_ms; /* the answer waits so long; other connections do not */
};

typedef void handler(const struct request *request, struct response *response);

/* Appends formatted text to the body. */
void body_printf(struct response *response, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Listens on the port and serves until SIGTERM or SIGINT, then lets what was begun end; answers the exit code. */
int serve(int port, const char *version, handler *handle);

#endif

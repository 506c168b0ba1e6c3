/* What /healthz answers. */
#define HEALTH_STATUS 500

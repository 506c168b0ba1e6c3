#!/bin/sh
# One line each second, until SIGTERM: the sleep runs beside, so that the signal is not kept waiting.
beat=0
trap 'echo "worker $APP_VERSION ends after $beat beats"; exit 0' TERM INT
while :; do
    beat=$((beat + 1))
    echo "worker $APP_VERSION heartbeat $beat $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    sleep 1 &
    wait $!
done

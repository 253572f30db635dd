#!/usr/bin/env bash
# Mooncake's transfer engine loads the RDMA libraries even where it uses TCP. Without them the P2P tests are skipped.
set -euo pipefail

have() { ldconfig -p | grep -q "$1"; }
if have libibverbs.so.1 && have librdmacm.so.1; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "libibverbs1 or librdmacm1 is missing: the P2P tests will be skipped" >&2
    exit 0
fi
apt-get update -qq || true
apt-get install -y -qq --no-install-recommends libibverbs1 librdmacm1 >/dev/null ||
    echo "libibverbs1 and librdmacm1 cannot be installed: the P2P tests will be skipped" >&2

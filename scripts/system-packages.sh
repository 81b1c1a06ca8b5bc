#!/bin/sh
# Installs the Debian packages that some tests use, where that is possible: as root, with apt-get, and unless
# DINOFORGE_NO_APT is set. Never fails: a test skips, and names its package, when the package is not there.
set -u

packages="plasma-workspace-wallpapers dataset-fashion-mnist g++ python3-dev chromium slurm-wlm munge iproute2"

missing=
for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ -n "${DINOFORGE_NO_APT:-}" ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Tests that need these Debian packages will be skipped:$missing"
    exit 0
fi

echo "installing for the tests:$missing"
export DEBIAN_FRONTEND=noninteractive
# $missing is left unquoted to be split into words.
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing; } >/dev/null; then
    echo "apt-get failed. Tests that need these Debian packages will be skipped:$missing"
fi
exit 0

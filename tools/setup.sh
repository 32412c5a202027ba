# Sourced by the scripts beside it: installs what is missing, prints nothing unless it fails.
#
#   setup PACKAGE …   Debian packages that the calling script needs besides the common ones
#
# Afterwards $top is the checkout and $top/.venv/bin has python and ctrfs.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# What the program itself runs on, and what its Python packages are built with.
common="fuse3 libfuse3-dev pkg-config gcc libc6-dev runc conmon python3-venv python3-dev"

quietly() {
    local log
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1 </dev/null 9<&-; then
        cat "$log" >&2
        rm -f "$log"
        echo "failed: $*" >&2
        exit 1
    fi
    rm -f "$log"
}

setup() {
    if [ "$(id -u)" != 0 ]; then
        echo "run this as root: it mounts filesystems and runs containers" >&2
        exit 1
    fi
    # One at a time: another script may be setting up the same checkout.
    { flock 9; install_missing "$@"; } 9<"$top/tools/setup.sh"
}

install_missing() {
    local missing="" package
    for package in $common "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" ||
            missing="$missing $package"
    done
    if [ -n "$missing" ]; then
        echo "Installing$missing …"
        export DEBIAN_FRONTEND=noninteractive
        quietly apt-get update
        # shellcheck disable=SC2086
        quietly apt-get install -o DPkg::Lock::Timeout=600 -y --no-install-recommends $missing
    fi
    local stamp
    stamp="$(sha256sum <"$top/pyproject.toml") $(/usr/bin/python3 -V) $top"
    if [ "$(cat "$top/.venv/stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "Making the virtual environment .venv …"
        # Debian's interpreter: its headers and venv were installed above.
        quietly /usr/bin/python3 -m venv --clear "$top/.venv"
        quietly "$top/.venv/bin/pip" install --disable-pip-version-check -e "$top[dev]"
        echo "$stamp" >"$top/.venv/stamp"
    fi
}

#!/bin/sh
# Installs the Debian packages of which the tests need a program that this machine lacks.
# Starts no service and touches none. What cannot be installed is told, and its tests say so too.
set -eu

PATH=$PATH:/usr/sbin:/sbin
for bin in /usr/lib/postgresql/*/bin; do PATH=$PATH:$bin; done

missing=
while read -r program package; do
    command -v "$program" >/dev/null || missing="$missing $package"
done <<LIST
busybox busybox-static
git git
initdb postgresql
ip iproute2
libvirtd libvirt-daemon
lxc-start lxc
mariadbd mariadb-server-core
my_print_defaults mariadb-client-core
nc.openbsd netcat-openbsd
nginx nginx-light
openssl openssl
pgrep procps
php php-cli
qemu-img qemu-utils
qemu-system-x86_64 qemu-system-x86
rsyslogd rsyslog
strace strace
virsh libvirt-clients
virt-qemu-run libvirt-daemon-driver-qemu
vsftpd vsftpd
zstd zstd
LIST
[ "$missing" ] || exit 0

cannot() {
    printf '\n*** The tests need, and this machine lacks:%s\n*** %s\n\n' "$missing" "$1" >&2
    exit 0
}

command -v apt-get >/dev/null || cannot "There is no apt-get here: install them by hand."
if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || cannot "Install them as root: apt-get install$missing"
    exec sudo -n "$0"
fi

# Debian's packages ask this script whether they may start what they bring.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
fi

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || cannot "apt-get update failed."
# shellcheck disable=SC2086
apt-get install -qq --no-install-recommends $missing </dev/null || cannot "apt-get install failed."

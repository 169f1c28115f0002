# Shared by the scripts beside it; for dash and busybox ash.
PATH=/usr/lib/godwit:/usr/sbin:/usr/bin:/sbin:/bin
export PATH

# The cgroup of all user programs: systemd's slice, or the one that init made.
if [ -d /sys/fs/cgroup/user.slice ]; then
    USER_CGROUP=/sys/fs/cgroup/user.slice
else
    USER_CGROUP=/sys/fs/cgroup/user
fi

fail() {
    echo "${0##*/}: $*" >&2
    exit 1
}

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

# user_programs 1|0: freezes or thaws, and waits until the kernel says so.
user_programs() {
    [ -e "$USER_CGROUP/cgroup.freeze" ] || return 0
    echo "$1" >"$USER_CGROUP/cgroup.freeze" || return 1
    tries=0
    while :; do
        while read -r key value; do
            [ "$key" = frozen ] && [ "$value" = "$1" ] && return 0
        done <"$USER_CGROUP/cgroup.events"
        # An empty group never reports frozen.
        [ "$1" = 1 ] && ! grep -q 'populated 1' "$USER_CGROUP/cgroup.events" && return 0
        tries=$((tries + 1))
        [ "$tries" -gt 500 ] && return 1
        sleep 0.01
    done
}

# vcpus 1|0: takes every vCPU but the first online or offline.
vcpus() {
    for online in /sys/devices/system/cpu/cpu[1-9]*/online; do
        [ -e "$online" ] || continue
        read -r now <"$online"
        [ "$now" = "$1" ] || echo "$1" >"$online"
    done
}

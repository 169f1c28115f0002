//! The service under a kernel of its own, with version 2 of control groups, and where pCPUs may be
//! taken offline. Machines are stand-ins: programs with QEMU's name and threads with
//! its vCPUs' names, which sleep.

mod support;

use std::time::Duration;

use godwit_lab::{Initramfs, Kernel, Machine, Spec};
use support::FakeVm;

const SOON: Duration = Duration::from_secs(40);

/// One of the stand-ins; nothing outside the guest.
#[test]
#[ignore = "the guest starts it"]
fn fake_vm() {
    if let Ok(vcpus) = std::env::var("FAKE_VM") {
        support::be_a_fake_vm(vcpus.parse().expect("a number of vCPUs"));
    }
}

/// What the guest's shell knows: machines, the service, and waiting for a state.
const TOOLS: &str = r#"
fake() { # NAME VCPUS [GROUP]: starts a stand-in, in a group if one is named
    sleep 10000 | {
        sh -c 'echo $PPID' >"/tmp/$1"
        [ -z "$3" ] || cat "/tmp/$1" >"/sys/fs/cgroup/$3/cgroup.procs"
        FAKE_VM=$2 FAKE_IDLE=1 exec qemu-system-fake --exact fake_vm --ignored --nocapture >/dev/null 2>&1
    } &
    until_ "[ \"\$(masks $1 | wc -w)\" = $2 ]"
}
masks() { # NAME: where its vCPUs may run
    for task in /proc/$(cat "/tmp/$1")/task/*; do
        grep -q '^CPU ' $task/comm && sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' $task/status
    done | sort | tr '\n' ' '
}
apart() { [ "$(masks "$1" | tr ' ' '\n' | sort -u | grep -c .)" = 2 ]; }
service() {
    godwit-sched-host run --json --state-dir /tmp/state "$@" >/tmp/out 2>/tmp/err & echo $! >/tmp/service
}
until_() { # WHAT...: waits for it, and says what there is where it does not come
    for i in $(seq 40); do eval "$*" && return; sleep 0.1; done
    echo "not so: $*"; masks a; masks b; ls /sys/fs/cgroup /sys/fs/cgroup/user; cat /tmp/out /tmp/err
    return 1
}
groups() { find /sys/fs/cgroup -name 'godwit-vm-*' | wc -l; }
"#;

#[test]
fn version_2_of_control_groups_and_pcpus_that_come_and_go() {
    let dir = tempfile::tempdir().expect("a directory");
    let kernel = Kernel::find().expect("a kernel");
    let initramfs = Initramfs::new()
        .program(FakeVm::program(dir.path()))
        .and_then(|i| i.program(env!("CARGO_BIN_EXE_godwit-sched-host")))
        .expect("the programs")
        .script("tools", TOOLS);
    let spec = Spec::new("sched-host-guest", 3, 512);
    let mut guest = Machine::boot(&kernel, &initramfs, &spec).expect("it boots");
    let mut sh = |text: &str| {
        let said = guest.run(&format!(". /bin/tools; {}", text.replace('\n', " ")), SOON);
        let said = said.unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(said.status, 0, "{text}: {}", said.output);
        said.output.trim().to_owned()
    };

    // One machine in the root group, two that share a group with a limit of its own.
    sh("mkdir /sys/fs/cgroup/user; fake a 2; fake b 2 user; fake c 2 user");
    sh("service; until_ '[ $(groups) = 3 ]'");
    sh("until_ 'apart a && apart b && apart c'");
    let group = "$(echo /sys/fs/cgroup/user/godwit-vm-$(cat /tmp/b)-*)";
    let of_b = format!("cat {group}/cgroup.type {group}/cpu.weight; wc -l <{group}/cgroup.threads");
    assert_eq!(sh(&of_b).split_whitespace().collect::<Vec<_>>(), ["threaded", "100", "2"]);
    assert_eq!(sh("cat /sys/fs/cgroup/user/cgroup.type"), "domain threaded");

    // Three pCPUs, two of them, three again: siblings are apart all the time.
    sh("echo 0 >/sys/devices/system/cpu/cpu1/online");
    sh("until_ '[ \"$(masks a)\" = \"0 2 \" ] && [ \"$(masks b)\" = \"0 2 \" ]'");
    sh("echo 0 >/sys/devices/system/cpu/cpu2/online; until_ '[ \"$(masks a)\" = \"0 0 \" ]'");
    sh("echo 1 >/sys/devices/system/cpu/cpu1/online; echo 1 >/sys/devices/system/cpu/cpu2/online");
    sh("until_ 'masks a | grep -q 1 && masks a | grep -q 2'");
    let masks = sh("masks a");
    let sets: Vec<&str> = masks.split_whitespace().collect();
    assert_eq!(sets.len(), 2);
    assert_eq!(sets.concat().chars().filter(char::is_ascii_digit).count(), 3, "disjoint: {masks}");

    // Killed, and put back by the next one, which is then asked to end.
    sh("kill -9 $(cat /tmp/service); [ $(groups) = 3 ]");
    sh("service; until_ '[ \"$(cat /tmp/state/lock)\" = \"$(cat /tmp/service)\" ]'");
    sh("kill $(cat /tmp/service); until_ '! kill -0 $(cat /tmp/service) 2>/dev/null'");
    let status: serde_json::Value = serde_json::from_str(&sh("cat /tmp/out")).expect("JSON");
    assert_eq!(status["at_start"]["threads"], 6, "{status}");
    assert_eq!(status["at_start"]["groups"], 3, "{status}");
    for when in ["at_start", "at_end"] {
        assert_eq!((&status[when]["failed"], &status[when]["left"]), (&0.into(), &0.into()));
    }
    assert_eq!(status["lesser"].as_array().map(Vec::len), Some(0), "{status}");
    assert_eq!(
        sh("groups; masks a; masks b; masks c").lines().collect::<Vec<_>>().join(" "),
        "0 0-2 0-2 0-2 0-2 0-2 0-2"
    );
    assert_eq!(
        sh("cat /sys/fs/cgroup/user/cgroup.type /sys/fs/cgroup/user/cgroup.subtree_control"),
        "domain"
    );
}

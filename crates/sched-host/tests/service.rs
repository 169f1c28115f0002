//! The service on real QEMU processes: what it does to them, and that it leaves no trace. Needs root
//! and two pCPUs.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use godwit_sched_host::config::Config;
use godwit_sched_host::service::Service;
use godwit_sched_host::status::{Status, VmStatus};
use godwit_sched_host::sys;
use support::{FakeVm, Hog, Qemu, eventually, ran_ns};

/// One of the fake machines that other tests start; nothing without them.
#[test]
#[ignore = "other tests start it"]
fn fake_vm() {
    if let Ok(vcpus) = std::env::var("FAKE_VM") {
        support::be_a_fake_vm(vcpus.parse().expect("a number of vCPUs"));
    }
}

fn config(state: &Path, pids: &[i32]) -> Config {
    Config {
        state_dir: state.to_owned(),
        only: Some(pids.to_vec()),
        scan: Duration::from_millis(200),
        threshold: Duration::from_millis(5),
        turn: Duration::ZERO,
        gang: Duration::ZERO,
        ..Config::default()
    }
}

fn vm(status: &Status) -> &VmStatus {
    status.vms.first().unwrap_or_else(|| panic!("no machine: {status:?}"))
}

fn nice(tid: i32) -> i32 {
    sys::get_attr(tid).expect("its attributes").nice
}

fn cpus(tid: i32) -> String {
    sys::get_affinity(tid).expect("its pCPUs").to_string()
}

fn group(pid: i32, tid: i32) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/cgroup"));
    godwit_sched_host::cgroup::cpu_path(&text.expect("its groups")).unwrap_or_default().to_owned()
}

/// All that the service may change of a thread.
fn traits(pid: i32, tid: i32) -> (i32, String, String) {
    (nice(tid), cpus(tid), group(pid, tid))
}

/// Groups made for this process that are left.
fn groups_of(pid: i32) -> Vec<PathBuf> {
    let mounts = ["/sys/fs/cgroup", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"];
    let prefix = format!("godwit-vm-{pid}-");
    let dirs = mounts.iter().filter_map(|m| std::fs::read_dir(m).ok()).flatten().flatten();
    dirs.map(|e| e.path())
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix)))
        .collect()
}

/// Starves the vCPU on one pCPU until a loan stands for it; the hog that does it.
fn until_a_loan_is_in_force(service: &Service, starved: i32, cpu: usize) -> Hog {
    let hog = Hog::on(cpu);
    eventually("a loan for the starved vCPU", || {
        let status = service.status();
        vm(&status).vcpus.iter().any(|v| v.tid == starved && v.steps < 0)
    });
    hog
}

#[test]
fn siblings_are_put_apart_lent_to_and_left_as_they_were() {
    let dir = tempfile::tempdir().expect("a directory");
    let qemu = Qemu::start(dir.path(), "lent", 2);
    let vcpus = qemu.vcpus();
    let before: Vec<_> = vcpus.iter().map(|t| traits(qemu.pid(), *t)).collect();
    let service = Service::start(config(dir.path(), &[qemu.pid()])).expect("a service");

    eventually("both are bound", || service.status().placements >= 2);
    assert_ne!(cpus(vcpus[0]), cpus(vcpus[1]), "on pCPUs of their own");
    assert_eq!(group(qemu.pid(), vcpus[0]), group(qemu.pid(), vcpus[1]));
    assert_eq!(groups_of(qemu.pid()).len(), 1);

    let starved = vcpus[1];
    let cpu = sys::get_affinity(starved).expect("its pCPUs").iter().next().expect("one");
    let hog = until_a_loan_is_in_force(&service, starved, cpu);
    let mut seen = (0, 0);
    eventually("the loan shows in both", || {
        let now = (nice(vcpus[0]), nice(starved));
        if now.1 < 0 && now.0 == -now.1 {
            seen = now;
        }
        seen.1 < 0
    });
    let begun = service.status().loans.loans;
    assert!(begun > 0);
    drop(hog);
    eventually("the loan is paid back", || {
        let ledger = service.status().loans;
        ledger.lent == ledger.settled && (nice(vcpus[0]), nice(starved)) == (0, 0)
    });

    let status = service.stop();
    let ledger = status.loans;
    assert_eq!(ledger.lent, ledger.settled + outstanding(&status), "{ledger:?}");
    assert_eq!(status.at_end.expect("a report").failed, 0);
    let after: Vec<_> = vcpus.iter().map(|t| traits(qemu.pid(), *t)).collect();
    assert_eq!(after, before);
    assert!(groups_of(qemu.pid()).is_empty());
}

fn outstanding(status: &Status) -> u64 {
    let steps = status.vms.iter().flat_map(|vm| &vm.vcpus).map(|v| v.steps.max(0));
    steps.sum::<i32>().unsigned_abs().into()
}

#[test]
fn the_next_start_puts_back_what_a_killed_service_left() {
    let dir = tempfile::tempdir().expect("a directory");
    let qemu = Qemu::start(dir.path(), "killed", 2);
    let vcpus = qemu.vcpus();
    let before: Vec<_> = vcpus.iter().map(|t| traits(qemu.pid(), *t)).collect();
    let state = dir.path().join("state");
    let mut service = program()
        .args(["run", "--pid", &qemu.pid().to_string(), "--threshold-ms", "5", "--turn-ms", "0"])
        .args(["--gang-ms", "0"])
        .arg("--state-dir")
        .arg(&state)
        .stdout(Stdio::null())
        .spawn()
        .expect("the service");
    eventually("both are bound", || cpus(vcpus[0]) != cpus(vcpus[1]));
    let cpu = sys::get_affinity(vcpus[0]).expect("its pCPUs").iter().next().expect("one");
    let hog = Hog::on(cpu);
    eventually("a loan stands", || nice(vcpus[0]) < 0);
    service.kill().expect("to kill it");
    service.wait().expect("its end");
    drop(hog);
    assert_ne!(cpus(vcpus[0]), cpus(vcpus[1]), "nobody has put it back yet");
    assert_eq!(groups_of(qemu.pid()).len(), 1);

    // It looks after another process, so what it does to this one is only to put it back.
    let own = i32::try_from(std::process::id()).expect("a process number");
    let service = Service::start(config(&state, &[own])).expect("the next service");
    let report = service.status().at_start;
    assert_eq!((report.threads, report.groups, report.failed), (2, 1, 0), "{report:?}");
    let after: Vec<_> = vcpus.iter().map(|t| traits(qemu.pid(), *t)).collect();
    assert_eq!(after, before);
    assert!(groups_of(qemu.pid()).is_empty());
    drop(service);
}

/// The weight of the group that was made for a machine.
fn weight(pid: i32) -> Option<u64> {
    let dir = groups_of(pid).pop()?;
    let text = ["cpu.shares", "cpu.weight"].map(|f| std::fs::read_to_string(dir.join(f)).ok());
    text.into_iter().flatten().next()?.trim().parse().ok()
}

#[test]
fn busy_machines_run_whole_in_turns_and_get_equal_parts() {
    let dir = tempfile::tempdir().expect("a directory");
    let machines = [Qemu::start(dir.path(), "whole-a", 2), Qemu::start(dir.path(), "whole-b", 2)];
    let pids = machines.each_ref().map(Qemu::pid);
    let gang = Duration::from_millis(10);
    let service = Service::start(Config { gang, ..config(dir.path(), &pids) }).expect("a service");
    // One of them has most of the weight, and it is not always the same.
    for favourite in [0, 1] {
        eventually("it has its turn", || {
            let weights = pids.map(weight);
            weights[favourite] > weights[1 - favourite].map(|w| 4 * w)
                && weights[1 - favourite].is_some()
        });
    }
    let ran =
        || machines.each_ref().map(|m| m.vcpus().iter().map(|t| ran_ns(m.pid(), *t)).sum::<u64>());
    let turns = service.status().gang_turns;
    let before = ran();
    eventually("a hundred turns", || service.status().gang_turns > turns + 100);
    let now = ran();
    let parts = [0, 1].map(|i| (now[i] - before[i]) as f64);
    assert!((0.7..1.4).contains(&(parts[0] / parts[1])), "not equal: {parts:?}");

    // One alone needs no turns, and has its usual weight again.
    let [first, second] = machines;
    drop(second);
    eventually("turns end", || service.status().gangs == 0);
    eventually("its weight is the usual one", || matches!(weight(first.pid()), Some(1024 | 100)));
    let status = service.stop();
    assert_eq!(status.at_end.expect("a report").failed, 0);
    assert!(groups_of(first.pid()).is_empty());
}

#[test]
fn a_machine_that_dies_takes_its_loans_along() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut qemu = Qemu::start(dir.path(), "dies", 2);
    let config = Config { life: Duration::from_secs(10), ..config(dir.path(), &[qemu.pid()]) };
    let service = Service::start(config).expect("a service");
    eventually("both are bound", || service.status().placements >= 2);
    let starved = qemu.vcpus()[0];
    let cpu = sys::get_affinity(starved).expect("its pCPUs").iter().next().expect("one");
    let _hog = until_a_loan_is_in_force(&service, starved, cpu);
    qemu.kill();
    eventually("it is forgotten", || {
        service.status().vms.is_empty() && groups_of(qemu.pid()).is_empty()
    });
    let status = service.stop();
    assert_eq!(status.loans.lent, status.loans.settled, "{:?}", status.loans);
    assert!(status.loans.gone > 0, "{:?}", status.loans);
    assert_eq!(status.at_end.expect("a report").failed, 0);
}

#[test]
fn vcpus_that_come_and_go_are_placed_and_forgotten() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut fake = FakeVm::start(&FakeVm::program(dir.path()), 2);
    // A loan that can't expire before the thread ends.
    let config = Config { life: Duration::from_secs(10), ..config(dir.path(), &[fake.pid()]) };
    let service = Service::start(config).expect("a service");
    eventually("both are bound", || service.status().placements >= 2);
    let status = service.status();
    let (gone, stays) = (vm(&status).vcpus[0].tid, vm(&status).vcpus[1].tid);
    let cpu = sys::get_affinity(gone).expect("its pCPUs").iter().next().expect("one");
    let hog = until_a_loan_is_in_force(&service, gone, cpu);
    fake.tell("end 0");
    eventually("its loan is settled", || {
        let status = service.status();
        nice(stays) == 0 && vm(&status).vcpus.len() == 1 && status.loans.gone > 0
    });
    drop(hog);

    fake.tell("add 7");
    eventually("the new one is in the group and apart from its sibling", || {
        let status = service.status();
        let Some(new) = vm(&status).vcpus.iter().find(|v| v.vcpu == 7) else { return false };
        cpus(new.tid) != cpus(stays) && group(fake.pid(), new.tid) == group(fake.pid(), stays)
    });
    let status = service.stop();
    assert_eq!(status.at_end.expect("a report").failed, 0);
    assert!(groups_of(fake.pid()).is_empty());
}

#[test]
fn the_owners_will_counts() {
    let dir = tempfile::tempdir().expect("a directory");
    let fake = FakeVm::start(&FakeVm::program(dir.path()), 2);
    let config = config(dir.path(), &[fake.pid()]);
    let mut discovery = godwit_sched_host::discover::Discovery::new(config.only.clone());
    let mut tids = Vec::new();
    eventually("it has its vCPUs", || {
        let found = discovery.scan().expect("a scan");
        tids = found.iter().flat_map(|vm| vm.threads().map(|t| t.tid)).collect();
        tids.len() == 2
    });
    let bind = |tid: i32, cpu: usize| {
        sys::set_affinity(tid, &std::iter::once(cpu).collect()).expect("to bind");
    };
    tids.iter().for_each(|tid| bind(*tid, 0));
    let service = Service::start(config).expect("a service");
    eventually("both are looked after", || service.status().placements >= 2);
    assert_eq!((cpus(tids[0]), cpus(tids[1])), ("0".into(), "0".into()), "by their owner's mask");
    // Their owner thinks again while the service works.
    bind(tids[1], 1);
    let placed = service.status().placements;
    eventually("that is noticed", || service.status().placements > placed);
    let status = service.stop();
    assert_eq!(status.at_end.expect("a report").failed, 0);
    assert_eq!((cpus(tids[0]), cpus(tids[1])), ("0".into(), "1".into()));
}

#[test]
fn a_process_that_names_itself_like_a_vcpu_is_left_alone() {
    let (told, hear) = std::sync::mpsc::channel();
    let (end, wait) = std::sync::mpsc::channel::<()>();
    let poser = std::thread::Builder::new().name("CPU 0/KVM".into()).spawn(move || {
        told.send(sys::gettid()).expect("somebody listens");
        let _ = wait.recv();
    });
    let tid = hear.recv().expect("its number");
    let own = i32::try_from(std::process::id()).expect("a process number");
    let before = traits(own, tid);
    let dir = tempfile::tempdir().expect("a directory");
    let service = Service::start(config(dir.path(), &[own])).expect("a service");
    eventually("it has looked a few times", || service.status().periods > 10);
    assert!(service.status().vms.is_empty());
    assert_eq!(traits(own, tid), before);
    drop(service);
    drop(end);
    poser.expect("a thread").join().expect("its end");
}

#[test]
fn a_thousand_short_lives_leave_nothing_behind() {
    let dir = tempfile::tempdir().expect("a directory");
    let shell = dir.path().join("qemu-system-short");
    std::fs::copy("/bin/sh", &shell).expect("to copy a shell");
    // Beyond one for each vCPU that is looked after now.
    let open = |status: &Status| {
        let files = std::fs::read_dir("/proc/self/fd").expect("own files").count();
        files.saturating_sub(status.vms.iter().map(|vm| vm.vcpus.len()).sum())
    };
    // All machines of the host would be looked at otherwise, those of other tests included.
    let state = dir.path().join("state");
    let config = Config {
        scan: Duration::from_millis(100),
        only: None,
        lend: false,
        spread: false,
        ..config(&state, &[])
    };
    let service = Service::start(config).expect("a service");
    let before = open(&service.status());
    let mut most = 0;
    let mine = |status: &Status| {
        status.vms.iter().filter(|vm| vm.name.starts_with("qemu-system-short")).count()
    };
    let name = "printf 'CPU 0/TCG' > /proc/$$/comm; read x";
    for _ in 0..20 {
        let start = |_| {
            let mut command = Command::new(&shell);
            command.args(["-c", name]).stdin(Stdio::piped()).spawn().expect("a short life")
        };
        let mut lives: Vec<_> = (0..50).map(start).collect();
        if most == 0 {
            eventually("some are seen", || mine(&service.status()) > 0);
        }
        most = most.max(mine(&service.status()));
        for life in &mut lives {
            drop(life.stdin.take());
            life.wait().expect("its end");
        }
    }
    eventually("all are forgotten", || {
        let status = service.status();
        mine(&status) == 0 && open(&status) <= before + 4
    });
    assert!(most > 0);
    let status = service.stop();
    assert_eq!(status.at_end.expect("a report").failed, 0);
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_godwit-sched-host"));
    command.stdin(Stdio::null());
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn refusals_are_in_clear_words() {
    let dir = tempfile::tempdir().expect("a directory");
    let own = i32::try_from(std::process::id()).expect("a process number");
    let service = Service::start(config(dir.path(), &[own])).expect("a service");
    let run = |args: &[&str]| {
        let mut command = program();
        command.args(["run", "--once", "--pid", &own.to_string()]).args(args);
        command.output().expect("the service's program")
    };
    let state = dir.path().to_string_lossy().into_owned();
    let second = run(&["--state-dir", &state]);
    assert_eq!(second.status.code(), Some(5));
    assert!(stderr(&second).contains(&own.to_string()), "{}", stderr(&second));
    drop(service);

    let nonsense = run(&["--state-dir", &state, "--period-ms", "0"]);
    assert_eq!(nonsense.status.code(), Some(2));
    assert!(stderr(&nonsense).contains("the period must be between"), "{}", stderr(&nonsense));
    assert_eq!(run(&["--state-dir", &state, "--max-steps", "40"]).status.code(), Some(2));
    assert_eq!(run(&["--state-dir", &state]).status.code(), Some(0));
}

#[test]
fn without_permission_it_says_so_and_touches_nothing() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65_534;
    let dir = tempfile::tempdir().expect("a directory");
    let everyone = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(dir.path(), everyone.clone()).expect("to open the directory");
    let copy = dir.path().join("godwit-sched-host");
    std::fs::copy(env!("CARGO_BIN_EXE_godwit-sched-host"), &copy).expect("to copy the program");
    let state = dir.path().join("state");
    std::fs::create_dir(&state).expect("a directory");
    std::os::unix::fs::chown(&state, Some(NOBODY), Some(NOBODY)).expect("to give it away");
    let qemu = Qemu::start(dir.path(), "roots", 2);
    let vcpus = qemu.vcpus();
    let before: Vec<_> = vcpus.iter().map(|t| traits(qemu.pid(), *t)).collect();
    let run = |state: &Path| {
        let mut command = Command::new(&copy);
        command.args(["run", "--once", "--pid", &qemu.pid().to_string(), "--state-dir"]);
        command.arg(state).uid(NOBODY).gid(NOBODY).current_dir("/");
        command.output().expect("the service's program")
    };
    let refused = run(Path::new("/proc/godwit"));
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("--state-dir"), "{}", stderr(&refused));

    let lesser = run(&state);
    let said = String::from_utf8_lossy(&lesser.stdout).into_owned();
    assert_eq!(lesser.status.code(), Some(0), "{said}{}", stderr(&lesser));
    assert!(said.contains("CAP_SYS_NICE is missing"), "{said}");
    let after: Vec<_> = vcpus.iter().map(|t| traits(qemu.pid(), *t)).collect();
    assert_eq!(after, before);
}

#[test]
fn without_control_groups_it_spreads_and_does_not_lend() {
    let dir = tempfile::tempdir().expect("a directory");
    let qemu = Qemu::start(dir.path(), "ungrouped", 2);
    let vcpus = qemu.vcpus();
    let script = "umount -l -R /sys/fs/cgroup && exec \"$0\" \"$@\"";
    let state = dir.path().join("state");
    let mut service = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, env!("CARGO_BIN_EXE_godwit-sched-host")])
        .args(["run", "--seconds", "4", "--json", "--threshold-ms", "1"])
        .args(["--pid", &qemu.pid().to_string(), "--state-dir"])
        .arg(&state)
        .stdout(Stdio::piped())
        .spawn()
        .expect("unshare");
    eventually("both are bound", || cpus(vcpus[0]) != cpus(vcpus[1]));
    let cpu = sys::get_affinity(vcpus[0]).expect("its pCPUs").iter().next().expect("one");
    let hog = Hog::on(cpu);
    let mut said = String::new();
    let stdout = service.stdout.as_mut().expect("its output");
    std::io::Read::read_to_string(stdout, &mut said).expect("its report");
    drop(hog);
    assert!(service.wait().expect("its end").success(), "{said}");
    let status: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert!(status["lesser"].to_string().contains("no loans"), "{said}");
    assert_eq!(status["loans"]["loans"], 0, "others would pay for them");
    assert!(status["placements"].as_u64() >= Some(2));
    assert!(groups_of(qemu.pid()).is_empty());
}

//! The scheduler in a guest that runs a kernel with sched_ext. Few boots, many checks: each leaves
//! the guest with the kernel's own class in charge.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use godwit_lab::{Answer, Initramfs, Kernel, Machine, Spec};
use godwit_sched_ext::Snapshot;

const SOON: Duration = Duration::from_secs(120);
const LOADER: &str = env!("CARGO_BIN_EXE_godwit-sched-ext");
const VM: &str = env!("CARGO_BIN_EXE_sched-ext-vm");

type Check = fn(&mut Guest);

struct Guest {
    machine: Machine,
}

impl Guest {
    fn boot() -> Self {
        let kernel = Kernel::find().expect("a kernel");
        let initramfs = Initramfs::new().program(LOADER).expect("the loader");
        let initramfs = initramfs.program(VM).expect("the stand-in");
        let mut spec = Spec::new("sched-ext", 4, 1024);
        spec.boot_within = Duration::from_secs(300);
        Self { machine: Machine::boot(&kernel, &initramfs, &spec).expect("it boots") }
    }

    fn ok(&mut self, line: &str) -> String {
        self.machine.ok(line, SOON).unwrap_or_else(|error| {
            let dmesg = self.machine.ok("dmesg | tail -40; cat /tmp/log", SOON);
            let console = self.machine.console().join("\n");
            panic!("{error}\n{console}\n{}", dmesg.unwrap_or_default())
        })
    }

    fn run(&mut self, line: &str) -> Answer {
        self.machine.run(line, SOON).expect("the guest answers")
    }

    /// Loads in the background; its output goes to /tmp/log, its pid to /tmp/pid.
    fn load(&mut self, args: &str) {
        self.ok(&format!(
            "rm -f /tmp/rc; (godwit-sched-ext load --json {args} >/tmp/log 2>&1 & echo $! >/tmp/pid; \
             wait $!; echo $? >/tmp/rc) >/dev/null 2>&1 & true"
        ));
        self.wait_state("enabled");
        // It answers once it has bound its socket.
        self.wait("godwit-sched-ext top --once --json >/dev/null 2>&1");
    }

    /// Waits until a line of shell succeeds.
    fn wait(&mut self, line: &str) {
        let until = Instant::now() + SOON;
        while self.run(line).status != 0 {
            if Instant::now() > until {
                let log = self.ok("cat /tmp/log; dmesg | tail -20");
                panic!("`{line}` never came true; the loader and the kernel say:\n{log}");
            }
        }
    }

    fn wait_state(&mut self, state: &str) {
        self.wait(&format!("grep -qx {state} /sys/kernel/sched_ext/state"));
    }

    fn top(&mut self) -> Snapshot {
        let text = self.ok("godwit-sched-ext top --once --json");
        serde_json::from_str(text.trim()).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Waits until every machine's record has gone.
    fn wait_no_vms(&mut self) {
        self.wait("godwit-sched-ext top --once --json | grep -q '\"vms\":\\[\\]'");
    }

    /// Ends the loader with a signal it obeys; what it counted in all.
    fn stop(&mut self, signal: &str) -> Snapshot {
        self.ok(&format!("kill -{signal} $(cat /tmp/pid)"));
        self.wait("test -s /tmp/rc");
        let log = self.ok("cat /tmp/log");
        assert_eq!(self.ok("cat /tmp/rc"), "0\n", "{log}");
        self.wait_state("disabled");
        let line = log.lines().rev().find(|l| l.starts_with('{')).expect("its last line is JSON");
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }
}

fn machines(text: &str) -> Vec<serde_json::Value> {
    let lines = text.lines().filter(|line| line.starts_with('{'));
    lines.map(|line| serde_json::from_str(line).expect("a stand-in says JSON")).collect()
}

fn assert_progress(text: &str, vms: usize) {
    let machines = machines(text);
    assert_eq!(machines.len(), vms, "{text}");
    assert!(machines.iter().all(|m| m["operations"].as_u64() > Some(0)), "{text}");
}

/// Nothing is owed any more, and each sum that says so was counted in its own place.
fn assert_settled(end: &Snapshot) {
    let c = &end.counters;
    assert!(c.balanced(), "{c:#?}");
    assert_eq!(c.get("vms_new"), c.get("vms_gone"), "a machine's record stayed: {c:#?}");
    assert!(end.vms.is_empty(), "{:?}", end.vms);
}

fn modes(guest: &mut Guest) {
    for mode in ["adaptive", "sbco", "strict", "bal", "procco", "cpuco", "dft"] {
        guest.load(&format!("--mode {mode} --vm-by process:sched-ext-vm"));
        guest.machine.start("sched-ext-vm run --vms 4 --seconds 2").expect("it starts");
        let work = guest.machine.finish(SOON).expect("it ends");
        assert_eq!(work.status, 0, "{}", work.output);
        assert_progress(&work.output, 4);
        guest.wait_no_vms();
        let end = guest.stop("TERM");
        let count = |name: &str| end.counters.get(name);
        assert_eq!(count("vms_new"), 4, "{mode}");
        assert_eq!(count("unmirrored"), 0, "{mode}");
        assert_settled(&end);
        assert!(count("timed") > 0, "{mode}: no turn was ended by its timer: {:#?}", end.counters);
        match mode {
            // Who spins never sleeps.
            "adaptive" => {
                assert!(count("tightened") >= 4 && count("gangs") > 0, "{:#?}", end.counters);
            }
            "sbco" => {
                assert!(count("loans") > 0 && count("settled") > 0, "{:#?}", end.counters);
                assert!(count("checks") >= count("exceeded") && count("exceeded") > 0);
            }
            "strict" => {
                assert!(count("gangs") > 0 && count("gang_joined") > 0, "{:#?}", end.counters);
                assert_eq!(count("loans"), 0, "{:#?}", end.counters);
            }
            "procco" | "cpuco" => assert!(count("forced") > 0, "{:#?}", end.counters),
            _ => assert_eq!(count("loans") + count("kicks"), 0, "{mode}"),
        }
        if mode != "dft" {
            // A sibling may stand beside another for a moment, until it is queued next.
            let stacked = count("stacked") * 100 / count("enqueues").max(1);
            assert!(stacked < 2, "{mode}: {stacked} % stacked, {:#?}", end.counters);
        }
    }
}

/// While machines run: siblings are apart, a second loader is refused, top shows them.
fn seen_while_it_runs(guest: &mut Guest) {
    guest.load("--vm-by process:sched-ext-vm");
    guest.ok("setsid sched-ext-vm run --vms 3 --seconds 200 >/dev/null 2>&1 & echo $! >/tmp/vms");
    guest.wait("[ $(godwit-sched-ext top --once | grep -c sched-ext-vm) -ge 4 ]");
    let top = guest.top();
    for vm in &top.vms {
        let mut cpus: Vec<u32> = vm.vcpus.iter().map(|v| v.cpu).collect();
        cpus.sort_unstable();
        cpus.dedup();
        assert_eq!(cpus.len(), vm.vcpus.len(), "siblings share a CPU: {vm:?}");
    }
    let second = guest.run("godwit-sched-ext load --mode bal");
    assert_eq!(second.status, 5, "{}", second.output);
    assert!(second.output.contains("'godwit' is enabled already"), "{}", second.output);
    guest.ok("kill -9 -$(cat /tmp/vms)");
    guest.wait_no_vms();
    let end = guest.stop("INT");
    assert_settled(&end);
}

/// A loader that is killed leaves a machine that schedules, and the next one can load.
fn killed(guest: &mut Guest) {
    guest.load("--vm-by process:sched-ext-vm");
    guest.ok("sched-ext-vm run --vms 3 --seconds 3 >/tmp/work 2>&1 &");
    guest.ok("kill -KILL $(cat /tmp/pid)");
    guest.wait_state("disabled");
    guest.wait("[ $(wc -l </tmp/work) -ge 3 ]");
    let work = guest.ok("cat /tmp/work");
    assert_progress(&work, 3);
    let top = guest.run("godwit-sched-ext top --once");
    assert_eq!(top.status, 4, "{}", top.output);
    guest.load("--mode bal");
    guest.stop("TERM");
}

/// The kernel may end it at any time: that is told, and is a failure.
fn ejected(guest: &mut Guest) {
    guest.load("");
    guest.ok("echo S >/proc/sysrq-trigger");
    guest.wait("test -s /tmp/rc");
    let log = guest.ok("cat /tmp/log");
    assert_eq!(guest.ok("cat /tmp/rc"), "1\n", "{log}");
    assert!(log.contains("the kernel has ended the scheduler"), "{log}");
    guest.wait_state("disabled");
}

/// A task that is ready and does not run has the kernel's watchdog take all tasks back.
fn stalled(guest: &mut Guest) {
    assert_no_warnings(guest);
    guest.ok("mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null; \
         for server in /sys/kernel/debug/sched/ext_server/cpu*/runtime; do \
             [ ! -e $server ] || echo 0 >$server; \
         done; \
         echo -1 >/proc/sys/kernel/sched_rt_runtime_us");
    guest.load("--watchdog 2");
    guest.ok("sched-ext-vm starve --cpu 3");
    guest.wait("test -s /tmp/rc");
    let log = guest.ok("cat /tmp/log");
    assert_eq!(guest.ok("cat /tmp/rc"), "1\n", "{log}");
    assert!(log.contains("the kernel has ended the scheduler"), "{log}");
    assert!(log.contains("runnable task stall"), "{log}");
    guest.wait_state("disabled");
    guest.ok("echo 950000 >/proc/sys/kernel/sched_rt_runtime_us; dmesg -c >/dev/null");
}

/// Machines that die with debts, threads that end between loan and settlement, threads added late.
fn deaths(guest: &mut Guest) {
    deaths_in(guest, "sbco", "loans");
    deaths_in(guest, "strict", "gangs");
    deaths_in(guest, "adaptive", "loans");
}

/// A vCPU that sleeps nearly always and one that does half of the time: the others go on, who sleeps is
/// not waited for, and nothing stays owed.
fn uneven(guest: &mut Guest) {
    for mode in ["adaptive", "sbco", "strict"] {
        guest.load(&format!("--mode {mode} --alpha 1/8 --vm-by process:sched-ext-vm"));
        let work = guest.ok("sched-ext-vm run --vms 3 --seconds 2 --kind uneven");
        assert_progress(&work, 3);
        let cpu: Vec<f64> = machines(&work).iter().filter_map(|m| m["cpu_ms"].as_f64()).collect();
        let most = cpu.iter().copied().fold(f64::MIN, f64::max);
        let least = cpu.iter().copied().fold(f64::MAX, f64::min);
        assert!(least > most * 0.7, "{mode}: {cpu:?}");
        guest.wait_no_vms();
        let end = guest.stop("TERM");
        assert_settled(&end);
    }
}

/// A kernel thread at nice 19 that holds locks of others' memory has turns as they have.
fn nice_kernel_thread(guest: &mut Guest) {
    let knobs = "cd /sys/kernel/mm/transparent_hugepage";
    let known = guest.ok(&format!(
        "{knobs}; sed 's/.*\\[\\(.*\\)\\].*/\\1/' enabled; cat khugepaged/scan_sleep_millisecs khugepaged/pages_to_scan"
    ));
    let known: Vec<&str> = known.split_whitespace().collect();
    let [enabled, pause, pages] = known[..] else { panic!("{known:?}") };
    let set = |enabled: &str, pause: &str, pages: &str| {
        format!(
            "{knobs}; echo {enabled} >enabled; echo {pause} >khugepaged/scan_sleep_millisecs; \
             echo {pages} >khugepaged/pages_to_scan"
        )
    };
    guest.ok(&set("always", "0", "100000"));
    guest.load("--mode bal --vm-by process:sched-ext-vm");
    guest.ok("sched-ext-vm run --vms 6 --seconds 5 >/tmp/work 2>&1 &");
    guest
        .ok("dd if=/dev/zero of=/dev/null bs=16M count=1000000 >/dev/null 2>&1 & echo $! >/tmp/dd");
    // Nanoseconds that it has run and waited.
    let khugepaged = "cat /proc/$(pidof khugepaged)/schedstat";
    let said = guest.ok(&format!("sleep 1; {khugepaged}; sleep 2; {khugepaged}"));
    let ns: Vec<f64> = said.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    let [ran, waited, _, ran_then, waited_then, _] = ns[..] else { panic!("{said}") };
    let (ran, waited) = ((ran_then - ran) / 1e6, (waited_then - waited) / 1e6);
    assert!(ran + waited > 1000.0, "it hardly wanted to run: {ran} ms, waited {waited} ms");
    assert!(waited > ran, "nobody else wanted to run: {ran} ms, waited {waited} ms");
    // It is one of eight in its queue at most; by its own weight it would have a hundredth of a turn.
    assert!(ran > (ran + waited) / 20.0, "it ran for {ran} ms and waited for {waited} ms");
    guest.ok("kill -9 $(cat /tmp/dd)");
    guest.ok(&set(enabled, pause, pages));
    guest.wait_no_vms();
    assert_progress(&guest.ok("cat /tmp/work"), 6);
    assert_settled(&guest.stop("TERM"));
}

fn deaths_in(guest: &mut Guest, mode: &str, sign: &str) {
    guest.ok("rm -f /tmp/churn");
    guest.load(&format!("--mode {mode} --vm-by process:sched-ext-vm"));
    guest.ok("sched-ext-vm run --vms 4 --seconds 3 --kind churn >/tmp/churn 2>&1 &");
    for _ in 0..4 {
        guest.ok(
            "setsid sched-ext-vm run --vms 3 --seconds 60 >/dev/null 2>&1 & sleep 0.5; kill -9 -$!",
        );
    }
    guest.wait("[ $(wc -l </tmp/churn) -ge 4 ]");
    let work = guest.ok("cat /tmp/churn");
    assert!(machines(&work).iter().all(|m| m["threads"].as_u64() > Some(20)), "{work}");
    guest.wait_no_vms();
    let end = guest.stop("TERM");
    assert!(end.counters.get(sign) > 0, "{mode}: {:#?}", end.counters);
    assert_settled(&end);
}

/// Machines that are named by their processes or by a control group.
fn named_one_by_one(guest: &mut Guest) {
    guest.ok("mkdir -p /sys/fs/cgroup/named");
    guest.ok("setsid sched-ext-vm run --vms 2 --seconds 200 >/dev/null 2>&1 & echo $! >/tmp/vms");
    let children =
        "grep -l \"^PPid:.$(cat /tmp/vms)$\" /proc/[0-9]*/status 2>/dev/null | cut -d/ -f3";
    guest.wait(&format!("[ $({children} | wc -l) -eq 2 ]"));
    let all = guest.ok(children);
    let pids: Vec<&str> = all.split_whitespace().collect();
    guest.load(&format!("--vm-by tgid:{}", pids[0]));
    guest.wait("godwit-sched-ext top --once --json | grep -q '\"runtime_ms\"'");
    let ids: Vec<u64> = guest.top().vms.iter().map(|vm| vm.id).collect();
    assert_eq!(ids, [pids[0].parse::<u64>().expect("a process")]);
    guest.stop("TERM");

    guest.ok(&format!("echo {} >/sys/fs/cgroup/named/cgroup.procs", pids[1]));
    guest.load("--vm-by cgroup:/sys/fs/cgroup/named");
    guest.wait("godwit-sched-ext top --once --json | grep -q '\"runtime_ms\"'");
    let ids: Vec<u64> = guest.top().vms.iter().map(|vm| vm.id).collect();
    let inode = guest.ok("stat -c %i /sys/fs/cgroup/named");
    assert_eq!(ids, [inode.trim().parse::<u64>().expect("an inode")]);
    guest.ok("kill -9 -$(cat /tmp/vms)");
    guest.wait_no_vms();
    assert_settled(&guest.stop("TERM"));
    guest.wait("rmdir /sys/fs/cgroup/named");
}

fn thousand_machines(guest: &mut Guest) {
    guest.load("--vm-by names");
    guest.ok("sched-ext-vm flash --count 1000 >/tmp/flash");
    assert_eq!(guest.ok("wc -l </tmp/flash").trim(), "1000");
    guest.wait_no_vms();
    let end = guest.stop("TERM");
    // Whoever was never queued between naming its threads and its end was not noticed.
    assert!(end.counters.get("vms_new") > 300, "{:#?}", end.counters);
    assert_settled(&end);
}

/// A CPU goes and comes back under load: loaded again each time, work goes on.
fn cpu_comes_and_goes(guest: &mut Guest) {
    guest.load("--vm-by process:sched-ext-vm");
    guest.ok("sched-ext-vm run --vms 3 --seconds 6 >/tmp/work 2>&1 &");
    guest.ok("echo 0 >/sys/devices/system/cpu/cpu3/online");
    guest.wait("godwit-sched-ext top --once --json | grep -q '\"restarts\":1'");
    guest.ok("echo 1 >/sys/devices/system/cpu/cpu3/online");
    guest.wait("godwit-sched-ext top --once --json | grep -q '\"restarts\":2'");
    guest.wait("[ $(wc -l </tmp/work) -ge 3 ]");
    let work = guest.ok("cat /tmp/work");
    assert_progress(&work, 3);
    let end = guest.stop("TERM");
    assert!(end.counters.balanced(), "{:#?}", end.counters);
}

/// Threads that call themselves vCPUs get no more than others do. Both kinds are counted over the
/// same seconds: neither has its first or its last moments alone.
fn self_named(guest: &mut Guest) {
    const RUNS: i64 = 2;
    for mode in ["adaptive", "sbco", "strict", "bal"] {
        guest.load(&format!("--mode {mode}"));
        let run = "sched-ext-vm run --seconds 3 --kind cpu --from $from";
        let (mut plain, mut named) = (0.0, 0.0);
        // A host that gives this guest's CPUs unequal time for a moment shifts one run, not both.
        for _ in 0..RUNS {
            let work = guest.ok(&format!(
                "from=$(( $(cut -d. -f1 /proc/uptime) + 3 )); \
                 {run} >/tmp/plain & {run} --named >/tmp/named & wait; cat /tmp/plain /tmp/named"
            ));
            let got: Vec<f64> =
                machines(&work).iter().filter_map(|m| m["cpu_ms"].as_f64()).collect();
            let [p, n] = got[..] else { panic!("{work}") };
            (plain, named) = (plain + p, named + n);
        }
        assert!(named < plain * 1.15, "{mode}: {named} ms against {plain} ms");
        let end = guest.stop("TERM");
        assert_eq!(end.counters.get("vms_new"), RUNS, "{mode}");
    }
}

fn yields(guest: &mut Guest) {
    let text = guest.ok("sched-ext-vm yield");
    let said = &machines(&text)[0];
    assert_eq!(said["lent"], true, "{text}");
    assert_eq!(said["stranger"], false, "{text}");
    assert_eq!(said["no_such_thread"], true, "{text}");
    let counter = |name: &str| said["counters"][name].as_i64().unwrap_or_default();
    assert!(counter("yields_to") > 0 && counter("yields") > 0, "{text}");
    assert_eq!(counter("paid_ns"), counter("lent_ns"), "{text}");
}

fn nonsense(guest: &mut Guest) {
    guest.ok("godwit-sched-ext check");
    for args in [
        "--alpha 4/3",
        "--alpha x",
        "--slice-us 1",
        "--owe 0",
        "--vm-by some",
        "--mode cfs",
        "--watchdog 60",
    ] {
        let answer = guest.run(&format!("godwit-sched-ext load {args}"));
        assert_eq!(answer.status, 2, "{args}: {}", answer.output);
    }
    let none = guest.run("godwit-sched-ext load --vm-by cgroup:/sys/fs/cgroup/none");
    assert_eq!(none.status, 1, "{}", none.output);
    assert!(none.output.contains("/sys/fs/cgroup/none: No such file"), "{}", none.output);
    assert_eq!(guest.ok("cat /sys/kernel/sched_ext/state"), "disabled\n");
}

/// How often a guest may die of its emulator.
const TRIES: u32 = 3;

/// Whether the guest's kernel met the breakpoint of a code patch after the patch was over, as
/// emulated CPUs that run at the same time may (QEMU's TCG; multipath-tcp/mptcp_net-next issue 471).
/// Loading and unloading a scheduler patches code.
fn emulator_failed(guest: &Guest) -> bool {
    guest.machine.console().iter().any(|line| line.contains("Oops: int3"))
}

/// Runs the checks in one guest; in another if that died of its emulator.
fn run_all(checks: &[(&str, Check)]) {
    for tried in 1.. {
        let mut guest = Guest::boot();
        let checked = catch_unwind(AssertUnwindSafe(|| check_all(&mut guest, checks)));
        let Err(failure) = checked else { return };
        if tried == TRIES || !emulator_failed(&guest) {
            resume_unwind(failure);
        }
    }
}

fn check_all(guest: &mut Guest, checks: &[(&str, Check)]) {
    for (name, check) in checks {
        let started = Instant::now();
        check(guest);
        let mut err = std::io::stderr();
        let took = started.elapsed().as_secs_f64();
        let _ = std::io::Write::write_fmt(&mut err, format_args!("{name}: {took:.1} s\n"));
    }
    assert_no_warnings(guest);
}

fn assert_no_warnings(guest: &mut Guest) {
    let warnings = guest.ok("dmesg | grep -E 'BUG|WARN|stall|runtime error' || true");
    assert_eq!(warnings, "", "the kernel complains");
}

#[test]
fn loading_and_unloading() {
    run_all(&[
        ("nonsense", nonsense),
        ("modes", modes),
        ("seen while it runs", seen_while_it_runs),
        ("killed", killed),
        ("ejected", ejected),
        ("stalled", stalled),
    ]);
}

#[test]
fn bad_days() {
    run_all(&[
        ("deaths", deaths),
        ("uneven", uneven),
        ("a nice kernel thread", nice_kernel_thread),
        ("named one by one", named_one_by_one),
        ("a thousand machines", thousand_machines),
        ("a CPU comes and goes", cpu_comes_and_goes),
        ("self-named", self_named),
        ("yields", yields),
    ]);
}

//! Kills at random: docks, activates or moves a machine again and again, kills a daemon, a relay
//! or a QEMU at a moment chosen by chance, and looks from outside what is left.
//!
//! ```text
//! cargo run -p godwit-tests --bin kills -- dock|activate|move [--count N] [--seed S]
//! ```
//!
//! A try is bad when the machine is neither whole nor ended with clear words, when a program of its
//! user stands still, when it lacks its card or its name, when it is there twice, when an operation
//! does not end, or when a QEMU stays that nobody lists.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a tool that prints its findings")]

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use godwit_tests::{Cloud, Daemon, Setup, exists, kill, within};
use serde_json::Value;

/// How long an operation may take to end after a kill.
const END_WITHIN: Duration = Duration::from_secs(120);
/// How long a machine may take to be as it must be after its operation has ended.
const SETTLE_WITHIN: Duration = Duration::from_secs(60);

/// Numbers by chance, the same for one seed.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n.max(1)
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::try_from(self.below(all.len() as u64)).unwrap()]
    }
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Center,
    Ap,
    SourceRelay,
    DestinationRelay,
    SourceQemu,
    DestinationQemu,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |flag: &str| {
        let at = args.iter().position(|a| a == flag)?;
        args.get(at + 1)?.parse::<u64>().ok()
    };
    let what = args.first().map(String::as_str).unwrap_or_default();
    let seed = value("--seed").unwrap_or(1).max(1);
    let mut chance = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let count = value("--count").unwrap_or(100);
    let attempt: fn(&mut Cloud, &mut Chance, u64) -> String = match what {
        "dock" => dock,
        "activate" => activate,
        "move" => travel,
        _ => {
            println!("kills dock|activate|move [--count N] [--seed S]");
            std::process::exit(2);
        }
    };
    let mut cloud = Some(start());
    let (mut bad, mut tally) = (0, std::collections::BTreeMap::<String, u64>::new());
    for n in 0..count {
        let begun = Instant::now();
        let mut place = cloud.take().unwrap_or_else(start);
        let ended = catch_unwind(AssertUnwindSafe(|| attempt(&mut place, &mut chance, n)));
        let took = begun.elapsed().as_secs_f64();
        match ended {
            Ok(how) => {
                println!("{n:4} ok   {took:5.1} s  {how}");
                *tally.entry(how).or_default() += 1;
                cloud = Some(place);
            }
            Err(why) => {
                bad += 1;
                let why = why
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| why.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                    .unwrap_or_default();
                println!("{n:4} BAD  {took:5.1} s  {why}");
                println!("{}", end_of(&place.log_text(Daemon::Center)));
                println!("{}", end_of(&place.log_text(Daemon::Ap)));
            }
        }
    }
    let mut sums = String::new();
    for (how, n) in tally {
        let _ = writeln!(sums, "  {n:4}  {how}");
    }
    println!("{what}: {count} tries, {bad} bad, seed {seed}\n{sums}");
    // Its daemons and machines end with it, and `exit` drops nothing.
    drop(cloud);
    if bad > 0 {
        std::process::exit(1);
    }
}

fn end_of(log: &str) -> &str {
    let from = log.char_indices().rev().nth(1500).map_or(0, |(at, _)| at);
    &log[from..]
}

fn start() -> Cloud {
    let cloud = Setup::new().patience(8).start();
    cloud.bring_substrate();
    cloud
}

/// A machine at work: what must be found again.
struct Work {
    name: String,
    site: Daemon,
    token: String,
    lines: u64,
}

impl Work {
    fn begin(cloud: &Cloud, name: &str, site: Daemon) -> Self {
        let _ = cloud.ok(&["vm", "activate", "base", "--name", name, "--site", site.site()]);
        let guest = cloud.guest(name);
        guest.answers();
        let token = guest.sh("head -c 16 /dev/urandom | md5sum | tee /run/token");
        Self { name: name.to_owned(), site, token, lines: guest.lines_beyond(0) }
    }

    /// It runs with its memory, its programs, its card and its name.
    fn whole(&self, cloud: &Cloud) {
        let guest = cloud.guest(&self.name);
        guest.answers();
        let _ = guest.intact(self.lines);
        assert_eq!(guest.sh("cat /run/token"), self.token, "its memory is another");
        own(cloud, &self.name);
    }
}

/// It has its own name and its card.
fn own(cloud: &Cloud, name: &str) {
    let what = format!("'{name}' to have its name and its card");
    within(SETTLE_WITHIN, &what, || {
        let text = cloud.guest(name).try_sh("hostname; cat /sys/class/net/eth0/address")?;
        let mut lines = text.lines();
        (lines.next() == Some(name) && lines.next().is_some()).then_some(())
    });
}

fn listed(cloud: &Cloud, name: &str) -> Option<Value> {
    let all = within(SETTLE_WITHIN, "the list of machines", || cloud.json(&["vm", "list"]));
    all.as_array().unwrap().iter().find(|v| v["name"] == name).cloned()
}

fn pooled(cloud: &Cloud, name: &str) -> bool {
    let all =
        within(SETTLE_WITHIN, "the list of substrates", || cloud.json(&["substrate", "list"]));
    all.as_array().unwrap().iter().any(|s| s["name"] == name)
}

fn sleep_by_chance(chance: &mut Chance, most: Duration) -> u64 {
    let ms = chance.below(u64::try_from(most.as_millis()).unwrap());
    // The moment of the kill is what is chosen by chance here.
    std::thread::sleep(Duration::from_millis(ms));
    ms
}

/// Kills a daemon and starts it again.
fn again(cloud: &mut Cloud, which: Daemon) {
    cloud.kill(which);
    match which {
        Daemon::Center => {
            cloud.restart_center();
            cloud.wait_ap();
        }
        Daemon::Ap => cloud.restart(Daemon::Ap),
    }
}

/// Waits until no operation goes on.
fn quiet(cloud: &Cloud) {
    within(END_WITHIN, "every operation to end", || {
        let ops = cloud.json(&["op", "list"])?;
        let goes_on = |o: &Value| o["state"] == "running" || o["state"] == "cancelling";
        (!ops.as_array()?.iter().any(goes_on)).then_some(())
    });
}

/// Waits until a machine is in no state on the way to another.
fn settled(cloud: &Cloud, name: &str) -> Option<Value> {
    within(SETTLE_WITHIN, &format!("'{name}' to be settled"), || {
        let vm = listed(cloud, name);
        let on_its_way = vm.as_ref().is_some_and(|v| {
            !["running", "stopped", "failed"].contains(&v["state"].as_str().unwrap_or_default())
        });
        (!on_its_way).then_some(vm)
    })
}

/// Deletes what a try made, and sees that no process stays that nobody lists.
fn clean(cloud: &Cloud, vm: Option<&str>, substrate: Option<&str>) {
    if let Some(name) = vm.filter(|n| listed(cloud, n).is_some()) {
        let _ = cloud.ok(&["vm", "delete", name]);
    }
    if let Some(name) = substrate.filter(|n| pooled(cloud, n)) {
        let _ = cloud.ok(&["substrate", "delete", name]);
    }
    within(SETTLE_WITHIN, "no QEMU and no relay that nobody lists", || {
        let strays: Vec<_> = [Daemon::Center, Daemon::Ap]
            .into_iter()
            .flat_map(|at| {
                let mut all = cloud.relays(at);
                all.extend(cloud.stray_qemus(at));
                all
            })
            .collect();
        strays.is_empty().then_some(())
    });
}

fn dock(cloud: &mut Cloud, chance: &mut Chance, n: u64) -> String {
    let site = chance.of(&[Daemon::Center, Daemon::Center, Daemon::Ap]);
    let (name, substrate) = (format!("d{n}"), format!("s{n}"));
    let work = Work::begin(cloud, &name, site);
    let vm = cloud.vm(&name);
    let victim = match (site, chance.below(6)) {
        (_, 0) => Victim::SourceQemu,
        (Daemon::Ap, 1..=3) => Victim::Ap,
        _ => Victim::Center,
    };
    let mut child = cloud.begin(&["vm", "dock", &name, "--name", &substrate]);
    let ms = sleep_by_chance(chance, Duration::from_millis(1600));
    harm(cloud, victim, &vm, site);
    let rc = child.0.wait().unwrap().code();
    quiet(cloud);
    let end = settled(cloud, &name);
    let how = match (&end, pooled(cloud, &substrate)) {
        (Some(vm), true) => panic!("{victim:?} after {ms} ms: both: {vm}"),
        (None, false) => panic!("{victim:?} after {ms} ms: neither, rc {rc:?}"),
        (None, true) => {
            let name = format!("{name}b");
            let _ = cloud.ok(&["vm", "activate", &substrate, "--name", &name]);
            Work { name: name.clone(), ..work }.whole(cloud);
            let _ = cloud.ok(&["vm", "delete", &name]);
            "docked"
        }
        (Some(vm), false) if vm["state"] == "running" => {
            work.whole(cloud);
            "runs on"
        }
        (Some(vm), false) if victim == Victim::SourceQemu => {
            restart_from_disk(cloud, &name, vm);
            "ended with its QEMU, its disk whole"
        }
        (Some(vm), false) => panic!("{victim:?} after {ms} ms, rc {rc:?}: {vm}"),
    };
    clean(cloud, Some(&name), Some(&substrate));
    format!("{victim:?} at {}: {how}", site.site())
}

/// A machine whose QEMU was killed says so, and starts from its disk.
fn restart_from_disk(cloud: &Cloud, name: &str, vm: &Value) {
    let reason = vm["reason"].as_str().unwrap_or_default();
    assert!(!reason.is_empty(), "no reason: {vm}");
    let _ = cloud.ok(&["vm", "start", name]);
    cloud.guest(name).answers();
    let text = cloud.guest(name).sh("/usr/lib/godwit/godwit-witness check --file /data/lines");
    assert!(text.contains("\"ok\":true"), "{text}");
}

fn harm(cloud: &mut Cloud, victim: Victim, vm: &Value, source: Daemon) {
    let destination = if source == Daemon::Center { Daemon::Ap } else { Daemon::Center };
    match victim {
        Victim::Center => again(cloud, Daemon::Center),
        Victim::Ap => again(cloud, Daemon::Ap),
        Victim::SourceRelay => cloud.relays(source).into_iter().for_each(kill),
        Victim::DestinationRelay => cloud.relays(destination).into_iter().for_each(kill),
        Victim::SourceQemu => cloud.qemu(vm, source).into_iter().for_each(kill),
        Victim::DestinationQemu => cloud.qemu(vm, destination).into_iter().for_each(kill),
    }
}

fn activate(cloud: &mut Cloud, chance: &mut Chance, n: u64) -> String {
    let site = chance.of(&[Daemon::Center, Daemon::Center, Daemon::Ap]);
    let name = format!("a{n}");
    let victim =
        if site == Daemon::Ap { chance.of(&[Victim::Ap, Victim::Center]) } else { Victim::Center };
    let mut child =
        cloud.begin(&["vm", "activate", "base", "--name", &name, "--site", site.site()]);
    let ms = sleep_by_chance(chance, Duration::from_millis(900));
    harm(cloud, victim, &Value::Null, site);
    let rc = child.0.wait().unwrap().code();
    quiet(cloud);
    let how = match settled(cloud, &name) {
        None => {
            assert_ne!(rc, Some(0), "{victim:?} after {ms} ms: rc 0 and no machine");
            "nothing is left"
        }
        Some(vm) if vm["state"] == "running" => {
            let guest = cloud.guest(&name);
            guest.answers();
            let _ = guest.intact(0);
            own(cloud, &name);
            "runs"
        }
        Some(vm) => panic!("{victim:?} after {ms} ms, rc {rc:?}: {vm}"),
    };
    clean(cloud, Some(&name), None);
    format!("{victim:?} at {}: {how}", site.site())
}

fn travel(cloud: &mut Cloud, chance: &mut Chance, n: u64) -> String {
    let site = chance.of(&[Daemon::Center, Daemon::Ap]);
    let to = if site == Daemon::Center { Daemon::Ap } else { Daemon::Center };
    let name = format!("m{n}");
    let work = Work::begin(cloud, &name, site);
    let vm = cloud.vm(&name);
    let victim = chance.of(&[
        Victim::Center,
        Victim::Ap,
        Victim::SourceRelay,
        Victim::DestinationRelay,
        Victim::SourceQemu,
        Victim::DestinationQemu,
    ]);
    let mut child = cloud.begin(&["vm", "migrate", &name, "--to", to.site()]);
    let ms = sleep_by_chance(chance, Duration::from_millis(2500));
    let late = !cloud.qemu(&vm, site).is_some_and(exists);
    harm(cloud, victim, &vm, site);
    let rc = child.0.wait().unwrap().code();
    quiet(cloud);
    let Some(end) = settled(cloud, &name) else {
        panic!("{victim:?} after {ms} ms, rc {rc:?}: the machine is gone")
    };
    // A QEMU that is killed takes what only it had along.
    let qemu = matches!(victim, Victim::SourceQemu | Victim::DestinationQemu);
    // One that was killed after its move is told of by its site's next report.
    let dead = |at: &Value| {
        let at = if at["site"] == Daemon::Ap.site() { Daemon::Ap } else { Daemon::Center };
        !cloud.qemu(&vm, at).is_some_and(exists)
    };
    let end = if qemu && end["state"] == "running" && dead(&end) {
        within(SETTLE_WITHIN, "the end of its QEMU to be told", || {
            listed(cloud, &name).filter(|vm| vm["state"] != "running")
        })
    } else {
        end
    };
    let how = if end["state"] == "running" {
        work.whole(cloud);
        if end["site"] == work.site.site() {
            "runs at its source"
        } else {
            "runs at its destination"
        }
    } else if qemu {
        restart_from_disk(cloud, &name, &end);
        "ended with its QEMU, its disk whole"
    } else {
        panic!("{victim:?} after {ms} ms, rc {rc:?}: {end}")
    };
    clean(cloud, Some(&name), None);
    format!("{victim:?}{}: {how}", if late { " (too late)" } else { "" })
}

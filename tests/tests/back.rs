//! The way back after the switch: a machine whose QEMU dies at its destination before all of its
//! memory is there runs on at its source.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

use std::time::{Duration, Instant};

use godwit_bench::link::{LaneSpec, Side};
use godwit_tests::{Cloud, Daemon, Setup, exists, kill, within};
use serde_json::Value;

/// The link: 100 Mbit/s, 10 ms each way.
const RATE: f64 = 100.0;
const DELAY: f64 = 10.0;
/// What it is slowed down to at the switch, in Mbit/s: memory is on its way for seconds.
const SLOW: f64 = 20.0;
/// Makes memory that is dirty at the switch, until it is told to stop.
const DIRTY: &str = "rm -f /tmp/stop; nohup sh -c 'while [ ! -e /tmp/stop ]; do dd if=/dev/urandom \
    of=/tmp/dirty bs=64k count=512 conv=notrunc; done' >/dev/null 2>&1 &";
/// Random bytes on the disk, in MiB.
const BALLAST: u32 = 8;
/// How long a move may take in all.
const MOVE_WITHIN: Duration = Duration::from_secs(120);
/// How long a machine may be gone.
const GONE_WITHIN: Duration = Duration::from_secs(2);
/// The machine is about to run at its destination, and its source does not know it.
const COMMITTED: &str = "relay.committed";

/// The destination has written down that the machine is dead there, and has told nobody.
const FELL: &str = "back.fell";
/// The center has raised the generation, and has told nobody.
const RAISED: &str = "back.raised";
/// The source has written down that it brings the machine back, and has not.
const RETURNING: &str = "back.returning";
/// The machine runs at its source, and nothing says so yet.
const RAN: &str = "back.ran";

struct Story {
    cloud: Cloud,
    name: String,
    lines: u64,
    sum: String,
    at: Daemon,
}

const fn other(than: Daemon) -> Daemon {
    match than {
        Daemon::Center => Daemon::Ap,
        Daemon::Ap => Daemon::Center,
    }
}

impl Story {
    fn begin() -> Self {
        let cloud = Setup::new().over_link(RATE, DELAY).patience(8).start();
        cloud.bring_substrate();
        let name = "work".to_owned();
        let _ = cloud.ok(&["vm", "activate", "base", "--name", &name, "--site", "center"]);
        let guest = cloud.guest(&name);
        let _ = guest.sh(&format!(
            "dd if=/dev/urandom of=/data/ballast bs=1M count={BALLAST} 2>/dev/null; sync"
        ));
        let sum = guest.sh("md5sum </data/ballast");
        let lines = guest.intact(0);
        Self { cloud, name, lines, sum, at: Daemon::Center }
    }

    fn rate(&self, mbit: f64) {
        for side in Side::BOTH {
            self.cloud.net().set(side, LaneSpec::new(mbit, DELAY)).unwrap();
        }
    }

    /// Memory, lines and disk are as they were left.
    fn intact(&mut self) {
        let guest = self.cloud.guest(&self.name);
        let _ = guest.sh("touch /tmp/stop");
        self.lines = guest.intact(self.lines);
        let _ = guest.sh("echo 3 >/proc/sys/vm/drop_caches");
        assert_eq!(guest.sh("md5sum </data/ballast"), self.sum);
    }

    /// Switches it to the other site while the link is slow; gives the operation.
    fn switch(&self) -> String {
        let to = other(self.at);
        let _ = self.cloud.guest(&self.name).sh(DIRTY);
        self.cloud.hold(COMMITTED);
        let begun = self.cloud.ok(&["vm", "migrate", &self.name, "--to", to.site(), "--no-wait"]);
        let _ = self.cloud.held(COMMITTED);
        self.rate(SLOW);
        self.cloud.let_go(COMMITTED);
        within(Duration::from_secs(20), "the center to know of the switch", || {
            (!self.cloud.vm(&self.name)["arriving"].is_null()).then_some(())
        });
        begun["op"].as_str().unwrap().to_owned()
    }

    fn kill_there(&self) {
        let vm = self.cloud.vm(&self.name);
        let there = other(self.at);
        eprintln!("killed at {}: {:?}", there.site(), self.cloud.relay(there));
        kill(self.cloud.qemu(&vm, there).expect("its QEMU"));
    }

    /// How the operation ended.
    fn ended(&self, op: &str) -> Value {
        within(MOVE_WITHIN, "the move's end", || {
            let o = self.cloud.op(op);
            let state = o["state"].as_str()?.to_owned();
            (!["running", "cancelling"].contains(&state.as_str())).then_some(o)
        })
    }

    /// It runs where it was, whole; what is undone is said, and nothing is left where it died.
    fn is_back(&mut self, op: &str, generation: u64) {
        let (here, there) = (self.at, other(self.at));
        let end = self.ended(op);
        self.rate(RATE);
        assert_eq!(end["state"], "failed", "{end}");
        let words = end["error"]["message"].as_str().unwrap_or_default();
        eprintln!("{words}");
        assert!(words.contains("are undone"), "{end}");
        self.cloud.runs_at(&self.name, here.site());
        let vm = self.cloud.vm(&self.name);
        assert_eq!(vm["generation"].as_u64(), Some(generation + 2), "{vm}");
        assert!(vm["arriving"].is_null() && vm["returning"].is_null(), "{vm}");
        let reason = vm["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("are undone") && words.contains(reason), "{vm}");
        within(Duration::from_secs(30), "what is left where it died to go", || {
            let free = self.cloud.qemu(&vm, there).is_none()
                && !self.cloud.vm_memory(&vm, there).exists()
                && !self.cloud.vm_dir(&vm, there).exists()
                && self.cloud.relays(there).is_empty()
                && self.cloud.relays(here).is_empty();
            free.then_some(())
        });
        self.intact();
    }

    /// Moves it for good.
    fn go(&mut self) {
        let to = other(self.at);
        let _ = self.cloud.ok(&["vm", "migrate", &self.name, "--to", to.site()]);
        self.cloud.runs_at(&self.name, to.site());
        self.at = to;
        self.intact();
    }

    fn generation(&self) -> u64 {
        self.cloud.vm(&self.name)["generation"].as_u64().unwrap()
    }

    /// Kills its QEMU there, and `daemon` where the way back has come to `step`.
    fn harmed(&mut self, step: &str, daemon: Daemon) {
        let generation = self.generation();
        let op = self.switch();
        self.cloud.hold(step);
        self.kill_there();
        let _ = self.cloud.held(step);
        self.cloud.kill(daemon);
        self.cloud.let_go(step);
        self.rate(RATE);
        let since = Instant::now();
        self.cloud.restart(daemon);
        self.is_back(&op, generation);
        eprintln!("{step}, daemon of {} killed: back after {:?}", daemon.site(), since.elapsed());
    }
}

/// What `vm get` says of a machine that runs at `site`, once it does.
fn runs(cloud: &Cloud, name: &str, site: &str) -> Option<Value> {
    let vm = cloud.json(&["vm", "get", name])?;
    (vm["state"] == "running" && vm["site"] == site).then_some(vm)
}

#[test]
fn a_machine_that_dies_at_its_destination_runs_on_at_its_source() {
    let mut story = Story::begin();
    for turn in 0..2 {
        let generation = story.generation();
        let op = story.switch();
        if turn == 0 {
            // It works there, and all of that is to be undone.
            let guest = story.cloud.guest(&story.name);
            assert_eq!(guest.sh("echo late >/data/late; sync; cat /data/late"), "late");
        }
        story.kill_there();
        let died = Instant::now();
        within(MOVE_WITHIN, "it to run where it was", || {
            runs(&story.cloud, &story.name, story.at.site())
        });
        let known = died.elapsed();
        let answered = within(MOVE_WITHIN, "its guest to answer", || {
            story.cloud.guest(&story.name).try_sh("echo here").map(|_| died.elapsed())
        });
        eprintln!("turn {turn}: runs after {known:?}, its guest answered after {answered:?}");
        assert!(known < GONE_WITHIN, "{known:?}");
        story.is_back(&op, generation);
        let late = story.cloud.guest(&story.name).sh("cat /data/late 2>/dev/null || echo undone");
        assert_eq!(late, "undone");
        // It can still move, and die at a site that it came to.
        story.go();
    }
}

#[test]
fn a_machine_comes_back_whichever_daemon_is_killed_on_the_way() {
    let mut story = Story::begin();
    for (step, daemon) in [
        (FELL, Daemon::Ap),
        (FELL, Daemon::Center),
        (RAISED, Daemon::Center),
        (RETURNING, Daemon::Center),
        (RAN, Daemon::Center),
    ] {
        story.harmed(step, daemon);
    }
    // A source that is not the center's own.
    story.go();
    for (step, daemon) in [(FELL, Daemon::Center), (RETURNING, Daemon::Ap), (RAN, Daemon::Ap)] {
        story.harmed(step, daemon);
    }
    story.go();
}

impl Story {
    /// Switches it, kills its QEMU there, and stops the way back at `step`; gives the operation.
    fn stopped_at(&self, step: &str) -> String {
        let op = self.switch();
        self.cloud.hold(step);
        self.kill_there();
        let _ = self.cloud.held(step);
        op
    }

    /// Its QEMU here dies, too.
    fn kill_here(&self, vm: &Value) {
        kill(self.cloud.qemu(vm, self.at).expect("its QEMU"));
    }

    /// Its way back has failed: it is started from a disk, and only that is left of it.
    fn starts_from_a_disk(&self, op: &str) {
        self.rate(RATE);
        let end = self.ended(op);
        assert_eq!(end["state"], "failed", "{end}");
        eprintln!("{}", end["error"]["message"]);
        let vm = self.cloud.vm(&self.name);
        assert_eq!(vm["state"], "failed", "{vm}");
        let _ = self.cloud.ok(&["vm", "start", &self.name]);
        let guest = self.cloud.guest(&self.name);
        guest.answers();
        assert_eq!(guest.sh("md5sum </data/ballast"), self.sum);
        let vm = self.cloud.vm(&self.name);
        assert!(vm["arriving"].is_null() && vm["returning"].is_null(), "{vm}");
        let free = if vm["site"] == self.at.site() { other(self.at) } else { self.at };
        self.is_free(&vm, free);
    }

    fn is_free(&self, vm: &Value, site: Daemon) {
        within(Duration::from_secs(30), "the other site to be free of it", || {
            let free = self.cloud.qemu(vm, site).is_none() && !self.cloud.vm_dir(vm, site).exists();
            free.then_some(())
        });
    }
}

#[test]
fn a_machine_that_fell_and_whose_source_died_is_started_from_a_disk() {
    let mut story = Story::begin();
    let vm = story.cloud.vm(&story.name);
    let op = story.stopped_at(FELL);
    // What was written down there is not heard by whoever asked, and its source cannot run it.
    story.cloud.kill(Daemon::Center);
    story.kill_here(&vm);
    story.cloud.let_go(FELL);
    story.rate(RATE);
    story.cloud.restart(Daemon::Center);
    story.starts_from_a_disk(&op);
}

#[test]
fn a_machine_whose_source_dies_on_the_way_back_is_started_from_a_disk() {
    for step in [RAISED, RETURNING] {
        let story = Story::begin();
        let vm = story.cloud.vm(&story.name);
        let op = story.stopped_at(step);
        story.kill_here(&vm);
        story.cloud.let_go(step);
        story.starts_from_a_disk(&op);
    }
}

#[test]
fn a_machine_is_not_started_and_can_be_deleted_on_its_way_back() {
    let story = Story::begin();
    let op = story.stopped_at(RETURNING);
    let vm = story.cloud.vm(&story.name);
    let refused = story.cloud.refused(&["vm", "start", &story.name], 5);
    assert!(refused.contains("is still moving"), "{refused}");
    let _ = story.cloud.ok(&["vm", "delete", &story.name]);
    story.cloud.let_go(RETURNING);
    story.rate(RATE);
    let end = story.ended(&op);
    assert_eq!(end["state"], "failed", "{end}");
    for site in [Daemon::Center, Daemon::Ap] {
        story.is_free(&vm, site);
    }
}

#[test]
fn a_machine_whose_end_nobody_saw_is_not_brought_back() {
    let mut story = Story::begin();
    let generation = story.generation();
    let op = story.switch();
    let vm = story.cloud.vm(&story.name);
    let pid = story.cloud.qemu(&vm, Daemon::Ap).expect("its QEMU");
    story.cloud.kill(Daemon::Ap);
    kill(pid);
    story.rate(RATE);
    story.cloud.restart(Daemon::Ap);
    let end = story.ended(&op);
    let words = end["error"]["message"].as_str().unwrap_or_default();
    assert!(end["state"] == "failed" && !words.contains("undone"), "{end}");
    assert_eq!(story.generation(), generation + 1);
    let _ = story.cloud.ok(&["vm", "start", &story.name]);
    let guest = story.cloud.guest(&story.name);
    guest.answers();
    assert_eq!(guest.sh("md5sum </data/ballast"), story.sum);
}

#[test]
fn a_machine_that_had_all_its_memory_is_started_from_its_disk_where_it_died() {
    let story = Story::begin();
    let (cloud, name) = (&story.cloud, &story.name);
    story.rate(SLOW / 2.0);
    let begun = cloud.ok(&["vm", "migrate", name, "--to", "cafe", "--no-wait"]);
    let op = begun["op"].as_str().unwrap();
    within(MOVE_WITHIN, "all of its memory to be there", || {
        (cloud.relay(Daemon::Center)?["phase"] == "memory-done").then_some(())
    });
    story.kill_there();
    story.rate(RATE);
    let end = story.ended(op);
    let words = end["error"]["message"].as_str().unwrap_or_default();
    assert!(end["state"] == "failed" && words.contains("its disk is whole"), "{end}");
    let vm = cloud.vm(name);
    assert_eq!((vm["state"].as_str(), vm["site"].as_str()), (Some("failed"), Some("cafe")), "{vm}");
    let _ = cloud.ok(&["vm", "start", name]);
    let guest = cloud.guest(name);
    guest.answers();
    assert_eq!(guest.sh("md5sum </data/ballast"), story.sum);
}

#[test]
fn a_guest_that_powers_itself_off_where_it_came_to_is_not_brought_back() {
    let story = Story::begin();
    let (cloud, generation) = (&story.cloud, story.generation());
    let op = story.switch();
    let vm = cloud.vm(&story.name);
    let pid = cloud.qemu(&vm, Daemon::Ap).expect("its QEMU");
    // The answer is lost with the guest.
    let _ = cloud.guest(&story.name).try_sh("poweroff -f");
    within(Duration::from_secs(60), "the guest to be off", || (!exists(pid)).then_some(()));
    story.rate(RATE);
    let end = story.ended(&op);
    let words = end["error"]["message"].as_str().unwrap_or_default();
    assert!(end["state"] == "failed" && !words.contains("undone"), "{end}");
    let vm = cloud.vm(&story.name);
    eprintln!("{vm}");
    assert_eq!(vm["site"], "cafe", "{vm}");
    assert_eq!(vm["generation"].as_u64(), Some(generation + 1), "{vm}");
    assert_eq!(cloud.guest(&story.name).try_sh("true"), None, "it runs nowhere");
}

//! Bad luck during the switch itself, at named steps: the machine stands still, its device state is
//! on its way, and nobody but the commit point says where it runs.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

use std::time::{Duration, Instant};

use godwit_tests::{Cloud, Daemon, Setup, kill, within};
use serde_json::Value;

/// How long a move may take to find out where its machine runs.
const END_WITHIN: Duration = Duration::from_secs(60);

/// The machine stands still, and its state has not come from QEMU.
const STOPPED: &str = "relay.stopped";
/// It has come, and nothing of it has left.
const PACKAGED: &str = "relay.packaged";
/// QEMU has been told to switch, and does not until its relay lets it.
const KEEPING: &str = "move.keeping";
/// The machine is about to run at its destination, and nothing says so yet.
const PONG: &str = "relay.pong";
/// The destination's relay has written down that it runs there, and has told nobody.
const WRITTEN: &str = "relay.written";
/// The source knows that it runs there, and the destination's daemon has not written it down.
const TOLD: &str = "move.ran";
/// The machine may run at its destination, and the source does not know it.
const COMMITTED: &str = "relay.committed";

/// What is said of a QEMU that was killed before anybody's eyes.
const KILLED: &str = "ended by signal 9";

/// Tells in a guest what [`Story::write_much`] wrote.
const DIGEST: &str = "sha256sum /data/much";

/// Which machine moves: one at work is handed over in post-copy, an idle one as pre-copy ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guest {
    AtWork,
    Idle,
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// The destination's relay.
    FarRelay,
    /// The destination's QEMU.
    FarQemu,
    /// The source's relay.
    Relay,
    /// The source's QEMU.
    Qemu,
    /// A daemon, whichever end it is.
    Site(Daemon),
    /// All that runs at the destination, as when its power fails.
    FarHost,
}

struct Story {
    cloud: Cloud,
    guest: Guest,
    lines: u64,
    machines: u32,
    at: Daemon,
}

const fn other(than: Daemon) -> Daemon {
    match than {
        Daemon::Center => Daemon::Ap,
        Daemon::Ap => Daemon::Center,
    }
}

impl Story {
    fn begin(guest: Guest) -> Self {
        let cloud = Setup::new().patience(5).start();
        if guest == Guest::AtWork {
            cloud.bring_substrate();
        }
        let mut story = Self { cloud, guest, lines: 0, machines: 0, at: Daemon::Center };
        story.make();
        story
    }

    fn name(&self) -> String {
        format!("m{}", self.machines)
    }

    /// A new machine, at the center.
    fn make(&mut self) {
        self.machines += 1;
        let name = self.name();
        match self.guest {
            Guest::AtWork => {
                let _ =
                    self.cloud.ok(&["vm", "activate", "base", "--name", &name, "--site", "center"]);
            }
            Guest::Idle => {
                let new = ["vm", "create", "--image", "tiny", "--name", &name, "--site", "center"];
                let _ = self.cloud.ok(&new);
                self.cloud.guest(&name).answers();
                let _ = self.cloud.guest(&name).sh("echo kept >/tmp/kept");
            }
        }
        (self.lines, self.at) = (0, Daemon::Center);
        self.intact();
    }

    fn intact(&mut self) {
        let name = self.name();
        match self.guest {
            Guest::AtWork => self.lines = self.cloud.guest(&name).intact(self.lines),
            Guest::Idle => assert_eq!(self.cloud.guest(&name).sh("cat /tmp/kept"), "kept"),
        }
    }

    /// Moves it where the next story begins.
    fn go(&mut self, to: Daemon) {
        if self.at != to {
            let name = self.name();
            let _ = self.cloud.ok(&["vm", "migrate", &name, "--to", to.site()]);
            self.cloud.runs_at(&name, to.site());
            self.at = to;
        }
    }

    /// Kills; gives the daemon that is to be started again.
    fn strike(&mut self, victim: Victim, vm: &Value) -> Option<Daemon> {
        let (near, far) = (self.at, other(self.at));
        match victim {
            Victim::FarRelay => self.cloud.relays(far).into_iter().for_each(kill),
            Victim::FarQemu => kill(self.cloud.qemu(vm, far).expect("a waiting QEMU")),
            Victim::Relay => self.cloud.relays(near).into_iter().for_each(kill),
            Victim::Qemu => kill(self.cloud.qemu(vm, near).expect("its QEMU")),
            Victim::Site(daemon) => {
                self.cloud.kill(daemon);
                return Some(daemon);
            }
            Victim::FarHost => {
                let qemu = self.cloud.qemu(vm, far).expect("a waiting QEMU");
                self.cloud.kill(far);
                self.cloud.relays(far).into_iter().for_each(kill);
                kill(qemu);
                return Some(far);
            }
        }
        None
    }

    /// Holds a move from `from` at `step`, kills `victim` there, and sees that one machine is left,
    /// whole, or what the only copy of its memory took along is said.
    fn harmed(&mut self, from: Daemon, step: &str, victim: Victim) {
        self.go(from);
        let name = self.name();
        // Whether the machine has run at its destination.
        let beyond = [WRITTEN, TOLD, COMMITTED].contains(&step);
        let written = (matches!(victim, Victim::FarQemu | Victim::FarHost) && beyond)
            .then(|| self.write_much());
        let before = self.cloud.vm(&name);
        self.cloud.hold(step);
        let begun =
            self.cloud.ok(&["vm", "migrate", &name, "--to", other(from).site(), "--no-wait"]);
        let op = begun["op"].as_str().unwrap().to_owned();
        let _ = self.cloud.held(step);
        let since = Instant::now();
        let again = self.strike(victim, &before);
        self.cloud.let_go(step);
        if let Some(daemon) = again {
            self.cloud.serves(daemon);
        }
        let what = format!("{:?}, {step}, {victim:?} killed", self.guest);
        let end = within(END_WITHIN, &format!("{what}: the move's end"), || {
            let all = self.cloud.json(&["op", "list"])?;
            let o = all.as_array()?.iter().find(|o| o["id"] == *op)?.clone();
            (!["running", "cancelling"].contains(&o["state"].as_str()?)).then_some(o)
        });
        let took = since.elapsed();
        let vm = self.cloud.vm(&name);
        eprintln!(
            "{what}: {} at {} after {took:?} ({})",
            vm["state"], vm["site"], end["error"]["message"]
        );
        let words = end["error"]["message"].as_str().unwrap_or_default();
        // What its destination has written down, also of what its relay had yet to read when it was
        // killed: whether all of its memory was there. Of one that was brought back nothing is left.
        let ran = self.cloud.vm_dir(&before, other(from)).join("ran");
        let had_all = std::fs::read(ran).is_ok_and(|says| says.get(1) == Some(&b'1'));
        match victim {
            // Its device state has come before all other steps, and all of its memory may have.
            Victim::Qemu if step == STOPPED || end["state"] != "done" => {
                self.ended_with_its_qemu(&end, KILLED, None);
            }
            // One that had all of its memory is started from its disk there.
            Victim::FarQemu if beyond && !had_all => {
                self.is_back(&end, &before, written.as_deref());
            }
            // No daemon saw how its QEMU ended: its guest may have powered itself off.
            Victim::FarHost if beyond => {
                self.ended_with_its_qemu(&end, "its QEMU is gone", written.as_deref());
            }
            Victim::FarQemu if beyond => {
                self.ended_with_its_qemu(&end, KILLED, written.as_deref());
            }
            Victim::FarHost => self.runs_on(&end),
            _ => {
                // Beyond the commit point nothing leads back.
                if beyond {
                    assert_eq!(end["state"], "done", "{what}: {end}");
                }
                // And nothing leads there before it.
                if step == PONG {
                    assert_eq!(end["state"], "failed", "{what}: {end}");
                }
                self.runs_on(&end);
            }
        }
        if step == KEEPING {
            // Nobody waits for what cannot come, and it is said where the machine is.
            assert!(words.contains("before the machine left its source"), "{what}: {end}");
            assert!(took < Duration::from_secs(15), "{what}: {took:?}");
        }
    }

    /// One machine runs where the operation says, and it is the one that was there before.
    fn runs_on(&mut self, end: &Value) {
        if end["state"] == "done" {
            self.at = other(self.at);
        }
        let name = self.name();
        self.cloud.runs_at(&name, self.at.site());
        self.is_free(other(self.at));
        self.intact();
    }

    /// A site has nothing of the machine.
    fn is_free(&self, site: Daemon) {
        let vm = self.cloud.vm(&self.name());
        within(Duration::from_secs(60), "the other site to be free of it", || {
            let free = self.cloud.qemu(&vm, site).is_none()
                && !self.cloud.vm_memory(&vm, site).exists()
                && self.cloud.relays(Daemon::Center).is_empty()
                && self.cloud.relays(Daemon::Ap).is_empty();
            free.then_some(())
        });
    }

    /// Writes much to its disk; gives the digest.
    fn write_much(&self) -> String {
        let write = "dd if=/dev/urandom of=/data/much bs=1M count=8 2>/dev/null && sync";
        self.cloud.guest(&self.name()).sh(&format!("{write} && {DIGEST}"))
    }

    /// What was killed had not all of its memory: it runs where it was, with its disk, and what is
    /// undone is said.
    fn is_back(&mut self, end: &Value, before: &Value, written: Option<&str>) {
        let words = end["error"]["message"].as_str().unwrap_or_default();
        assert!(end["state"] == "failed" && words.contains("are undone"), "{end}");
        let vm = self.cloud.vm(&self.name());
        let generation = |vm: &Value| vm["generation"].as_u64().unwrap();
        // Warrants that were made void before have generations of their own.
        assert!(generation(&vm) > generation(before) + 1, "{vm}");
        self.runs_on(end);
        if let Some(digest) = written {
            let _ = self.cloud.guest(&self.name()).sh("echo 3 >/proc/sys/vm/drop_caches");
            assert_eq!(self.cloud.guest(&self.name()).sh(DIGEST), digest);
        }
    }

    /// The only copy of its memory was killed: that is said, and its disk is whole.
    fn ended_with_its_qemu(&mut self, end: &Value, why: &str, written: Option<&str>) {
        let name = self.name();
        let words = end["error"]["message"].as_str().unwrap_or_default();
        assert!(end["state"] == "failed" && words.contains(why), "{end}");
        let vm = self.cloud.vm(&name);
        assert!(vm["state"] == "failed" && vm["reason"].is_string(), "{vm}");
        let _ = self.cloud.ok(&["vm", "start", &name]);
        self.cloud.guest(&name).answers();
        if self.guest == Guest::AtWork {
            let check = "/usr/lib/godwit/godwit-witness check --file /data/lines";
            let text = self.cloud.guest(&name).sh(check);
            assert!(text.contains("\"ok\":true"), "{text}");
        }
        if let Some(digest) = written {
            assert_eq!(self.cloud.guest(&name).sh(DIGEST), digest);
        }
        let _ = self.cloud.ok(&["vm", "delete", &name]);
        self.make();
    }
}

/// One of each victim, as `GODWIT_SWITCH` names them, or all.
fn one_machine_is_left(guest: Guest, stories: &[(&str, &[(Daemon, Victim)])]) {
    let mut story = Story::begin(guest);
    let only = std::env::var("GODWIT_SWITCH").unwrap_or_default();
    for (step, victims) in stories {
        for (from, victim) in *victims {
            if format!("{step}-{from:?}-{victim:?}").contains(&only) {
                story.harmed(*from, step, *victim);
            }
        }
    }
    // And it can still move.
    let to = other(story.at);
    story.go(to);
    story.intact();
}

const EACH: [(Daemon, Victim); 8] = [
    (Daemon::Center, Victim::FarRelay),
    (Daemon::Center, Victim::FarQemu),
    (Daemon::Center, Victim::Relay),
    (Daemon::Center, Victim::Site(Daemon::Center)),
    (Daemon::Center, Victim::Site(Daemon::Ap)),
    (Daemon::Ap, Victim::Site(Daemon::Ap)),
    (Daemon::Center, Victim::FarHost),
    (Daemon::Center, Victim::Qemu),
];

#[test]
fn one_machine_is_left_whatever_is_killed_while_a_busy_one_is_handed_over() {
    // Whatever the daemon there has come to write down, its relay's word counts.
    let at_the_point = [(Daemon::Center, Victim::FarHost), (Daemon::Center, Victim::FarRelay)];
    let told = [(Daemon::Center, Victim::FarHost)];
    let steps: [(&str, &[(Daemon, Victim)]); 6] = [
        (STOPPED, &EACH),
        (PACKAGED, &EACH),
        (PONG, &at_the_point),
        (WRITTEN, &at_the_point),
        (TOLD, &told),
        (COMMITTED, &EACH),
    ];
    one_machine_is_left(Guest::AtWork, &steps);
}

#[test]
fn one_machine_is_left_whatever_is_killed_while_an_idle_one_is_handed_over() {
    let beyond = [
        (Daemon::Center, Victim::Relay),
        (Daemon::Center, Victim::Site(Daemon::Center)),
        (Daemon::Ap, Victim::Site(Daemon::Ap)),
    ];
    one_machine_is_left(
        Guest::Idle,
        &[
            (KEEPING, &[(Daemon::Center, Victim::Relay)]),
            (STOPPED, &EACH[..2]),
            (PACKAGED, &EACH[..6]),
            (COMMITTED, &beyond),
        ],
    );
}

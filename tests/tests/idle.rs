//! Machines that do nothing, moved again and again: their QEMU finds nothing dirty at the switch and
//! ends as pre-copy, which a machine at work never shows.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test tells its figures")]

use std::time::{Duration, Instant};

use godwit_tests::{Cloud, Daemon, Setup};

/// How long a machine does nothing before each move. This is what is tested, and no waiting for a
/// state.
const IDLE: Duration = Duration::from_secs(1);
/// Moves of one activation.
const A_MACHINE: usize = 6;
/// How many moves there are when `GODWIT_IDLE_MOVES` says nothing else.
const MOVES: usize = 12;

fn moves() -> usize {
    let asked = std::env::var("GODWIT_IDLE_MOVES").ok();
    asked.map_or(MOVES, |n| n.parse().expect("GODWIT_IDLE_MOVES is a number"))
}

/// Activates machines without any program in them, and moves each there and back. About half of the
/// moves end as pre-copy; with `until_open` it goes on until one has, for three times as many.
fn move_idle_machines(cloud: &Cloud, moves: usize, until_open: bool) {
    let _ = cloud.ok(&["vm", "create", "--image", "tiny", "--name", "seed", "--site", "center"]);
    cloud.guest("seed").answers();
    let _ = cloud.ok(&["vm", "dock", "seed", "--name", "idle"]);
    let (mut made, mut open, mut worst) = (0, 0, Duration::ZERO);
    for turn in 0.. {
        let goes_on = made < moves || until_open && open == 0 && made < 3 * moves;
        if !goes_on {
            break;
        }
        let round = if made < moves { A_MACHINE.min(moves - made) } else { A_MACHINE };
        let name = format!("w{turn}");
        let _ = cloud.ok(&["vm", "activate", "idle", "--name", &name, "--site", "center"]);
        let memory = cloud.guest(&name).sh("md5sum /proc/version; cat /etc/machine-id");
        for at in 0..round {
            let to = if at % 2 == 0 { Daemon::Ap } else { Daemon::Center };
            std::thread::sleep(IDLE);
            let begun = Instant::now();
            let moved = cloud.ok(&["vm", "migrate", &name, "--to", to.site()]);
            worst = worst.max(begun.elapsed());
            let report = &moved["report"];
            assert!(report["downtime_ms"].is_number(), "{moved}");
            open += usize::from(report["pages"]["discarded_bytes"] == 0);
            cloud.runs_at(&name, to.site());
        }
        made += round;
        assert_eq!(cloud.guest(&name).sh("md5sum /proc/version; cat /etc/machine-id"), memory);
        let _ = cloud.ok(&["vm", "delete", &name]);
    }
    // That is what is tried here: the relay makes of it what post-copy looks like.
    assert!(open > 0 || !until_open, "none of {made} moves ended as pre-copy");
    eprintln!(
        "{made} moves of idle machines, none hung; {open} ended as pre-copy; the longest took {worst:?}"
    );
}

#[test]
fn idle_machines_make_round_trips() {
    move_idle_machines(&Cloud::start(), moves(), true);
}

#[test]
fn idle_machines_move_over_a_fast_link() {
    // 1 Gbit/s and 0.2 ms each way.
    let cloud = Setup::new().over_link(1000.0, 0.2).start();
    move_idle_machines(&cloud, moves() / 3, false);
}

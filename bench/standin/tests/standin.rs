//! The stand-ins do the same work whoever does it, lose nothing, and end when told.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use godwit_standin::{Config, EndReason, MOST_SLOWER, StandIn, cc, run};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_godwit-standin");

const fn little(what: StandIn) -> u64 {
    match what {
        StandIn::Dedup => 3,
        StandIn::Streamcluster => 12,
        // Not a whole number of directories.
        StandIn::Kernbench => 37,
        // More than two collections.
        StandIn::Specjbb => 9_000,
        StandIn::Cpu => 20,
        StandIn::Locks => 1_001,
    }
}

fn digest(what: StandIn, threads: usize, seed: u64) -> String {
    let config = Config { threads, seed, work: Some(little(what)), ..Config::new(what) };
    let outcome = run(&config, &AtomicBool::new(false)).expect("the work is done");
    assert_eq!(outcome.ended, EndReason::Done);
    assert_eq!(outcome.cpu_ms.len(), threads);
    if what != StandIn::Dedup {
        assert_eq!(outcome.operations, little(what), "{what:?}");
    }
    outcome.digest.expect("finished work has a digest")
}

#[test]
fn a_result_belongs_to_seed_and_work_however_many_threads_there_are() {
    for what in StandIn::ALL {
        let one = digest(what, 1, 1);
        for threads in [2, 4, 5] {
            assert_eq!(digest(what, threads, 1), one, "{what:?} with {threads} threads");
        }
        if what != StandIn::Cpu {
            assert_ne!(digest(what, 1, 2), one, "{what:?} with another seed");
        }
    }
}

/// Smaller operations lose nothing either, and dedup's are smaller: more chunks of the same input.
#[test]
fn a_slower_processor_does_smaller_operations() {
    let done = |what: StandIn, threads: usize, slower: u32| {
        let config = Config { threads, slower, work: Some(little(what)), ..Config::new(what) };
        let outcome = run(&config, &AtomicBool::new(false)).expect("the work is done");
        assert_eq!(outcome.ended, EndReason::Done, "{what:?}");
        (outcome.digest, outcome.operations)
    };
    for what in StandIn::ALL {
        for slower in [16, MOST_SLOWER] {
            assert_eq!(done(what, 4, slower), done(what, 1, slower), "{what:?} at {slower}");
        }
    }
    assert!(done(StandIn::Dedup, 1, 16).1 > 8 * done(StandIn::Dedup, 1, 1).1);
}

#[test]
fn a_queue_of_one_loses_nothing_either() {
    let base = Config { threads: 2, work: Some(1), ..Config::new(StandIn::Dedup) };
    let narrow = run(&Config { queue: 1, ..base.clone() }, &AtomicBool::new(false));
    let wide = run(&base, &AtomicBool::new(false));
    assert_eq!(narrow.expect("done").digest, wide.expect("done").digest);
}

#[test]
fn time_ends_what_has_no_end() {
    for (what, threads) in StandIn::ALL.into_iter().flat_map(|w| [(w, 1), (w, 4)]) {
        let time = Some(Duration::from_millis(150));
        let config = Config { threads, time, time_locks: true, ..Config::new(what) };
        let outcome = run(&config, &AtomicBool::new(false)).expect("it ends");
        assert_eq!((outcome.ended, &outcome.digest), (EndReason::Time, &None), "{what:?}");
        assert!(outcome.elapsed_ms >= 150.0, "{what:?}: {} ms", outcome.elapsed_ms);
        let held = outcome.hold.map_or(0, |h| h.count);
        assert_eq!(held, outcome.locks.passed, "{what:?}");
    }
}

#[test]
fn nonsense_is_refused() {
    let never = AtomicBool::new(false);
    for threads in [0, 1025] {
        let config = Config { threads, work: Some(1), ..Config::new(StandIn::Cpu) };
        run(&config, &never).expect_err("a bad number of threads");
    }
    for slower in [0, MOST_SLOWER + 1] {
        let config = Config { slower, work: Some(1), ..Config::new(StandIn::Cpu) };
        run(&config, &never).expect_err("no such speed");
    }
    let config = Config { queue: 0, work: Some(1), ..Config::new(StandIn::Dedup) };
    run(&config, &never).expect_err("a queue without room");
    for args in [&["pi"][..], &["cpu", "--seconds", "-1"], &["cpu", "--work", "1", "--disturb"]] {
        let status = Command::new(PROGRAM).args(args).stderr(Stdio::null()).status();
        assert_eq!(status.expect("started").code(), Some(2), "{args:?}");
    }
}

fn start(args: &[&str]) -> Child {
    let mut command = Command::new(PROGRAM);
    command.args(args).stdout(Stdio::piped()).spawn().expect("the program starts")
}

/// CPU time of a process in clock ticks.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let after = stat.rsplit_once(')').expect("a name").1;
    let field = |n: usize| after.split_whitespace().nth(n).and_then(|f| f.parse::<u64>().ok());
    field(11).zip(field(12)).map(|(user, system)| user + system).expect("two times")
}

fn until(what: &str, mut there: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !there() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn terminate(pid: u32) {
    let status = Command::new("kill").arg(pid.to_string()).status().expect("kill starts");
    assert!(status.success());
}

#[test]
fn sigterm_ends_all_within_a_moment_and_they_report_what_they_did() {
    for what in StandIn::ALL {
        let mut child = start(&[what.name(), "--disturb", "--json", "--threads", "4"]);
        until("its work", || ticks(child.id()) >= 5);
        let told = Instant::now();
        terminate(child.id());
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().expect("piped"));
        out.read_line(&mut line).expect("it speaks");
        assert!(child.wait().expect("it ends").success(), "{what:?}");
        assert!(told.elapsed() < Duration::from_secs(5), "{what:?}: {:?}", told.elapsed());
        let outcome: Value = serde_json::from_str(&line).expect("a line of JSON");
        assert_eq!(outcome["ended"], "told", "{line}");
        assert!(outcome["stands_for"].as_str().is_some_and(|s| s.contains("stand-in")), "{line}");
    }
}

#[test]
fn a_fleet_measures_one_among_others_and_leaves_none_behind() {
    let fleet = ["fleet", "--measured", "kernbench", "--others", "cpu", "--count", "2"];
    let times = ["--threads", "2", "--seconds", "0.6", "--lead", "0.1", "--sample", "0.2"];
    let out = Command::new(PROGRAM).args(fleet).args(times).output().expect("the fleet starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let report: Value = serde_json::from_slice(&out.stdout).expect("a line of JSON");
    assert!(report["measured"]["operations"].as_u64().expect("a number") > 0, "{report}");
    let others = report["others"].as_array().expect("others");
    assert!(others.len() == 2 && others.iter().all(|o| o["ended"] == "told"), "{report}");
    let samples = report["cpu_ms"].as_array().expect("samples");
    assert!(samples.len() >= 3, "{report}");
    for machine in 0..3 {
        let at = |s: &Value| s[machine].as_f64().expect("ms");
        assert!(samples.windows(2).all(|w| at(&w[0]) <= at(&w[1])), "{report}");
        assert!(at(&samples[samples.len() - 1]) > 0.0, "{report}");
    }
    assert!(report["switches"].as_u64().expect("a number") > 0, "{report}");
}

#[test]
fn a_fleet_that_is_killed_takes_its_members_along() {
    let mut fleet = start(&["fleet", "--count", "2", "--threads", "1", "--seconds", "60"]);
    let children = format!("/proc/{0}/task/{0}/children", fleet.id());
    let members = || -> Vec<u32> {
        let text = std::fs::read_to_string(&children).unwrap_or_default();
        text.split_whitespace().filter_map(|p| p.parse().ok()).collect()
    };
    until("two members", || members().len() == 2);
    let pids = members();
    // Once they work they have asked to die with the fleet.
    until("their work", || pids.iter().all(|p| ticks(*p) >= 5));
    fleet.kill().expect("killed");
    fleet.wait().expect("ended");
    until("their end", || {
        pids.iter().all(|p| {
            let stat = std::fs::read_to_string(format!("/proc/{p}/stat")).unwrap_or_default();
            // Gone, or dead and not yet waited for by whoever inherited it.
            stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'))
        })
    });
}

#[test]
fn a_real_tree_is_built_and_gives_the_right_answer() {
    let never = AtomicBool::new(false);
    let one = cc::build(3, 2, 1, &never).expect("a C compiler is there");
    let other = cc::build(3, 2, 2, &never).expect("a C compiler is there");
    assert_eq!(one.operations, 4);
    assert_ne!(one.digest, other.digest);
    cc::build(1, 0, 1, &never).expect_err("no jobs");
    cc::build(1, 1, 1, &AtomicBool::new(true)).expect_err("told to end");
}

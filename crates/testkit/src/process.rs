//! Processes that belong to a test, found by what they were started with.

use std::path::Path;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        // One that has ended already needs no signal.
        let _ = kill_process(pid, signal);
    }
}

/// `kill -9`.
pub fn kill(pid: i32) {
    signal(pid, Signal::KILL);
}

/// Stops a process where it is, so that what it would do next is not done.
pub fn pause(pid: i32) {
    signal(pid, Signal::STOP);
}

/// Lets a paused process go on.
pub fn resume(pid: i32) {
    signal(pid, Signal::CONT);
}

/// Whether a process lives; one that waits to be reaped does not.
#[must_use]
pub fn exists(pid: i32) -> bool {
    let Some(p) = Pid::from_raw(pid) else { return false };
    if test_kill_process(p).is_err() {
        return false;
    }
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
}

/// The command line of a process, its words apart; empty when it is gone.
fn words(pid: i32) -> Vec<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect()
}

/// The word on a process's command line that `is` so.
#[must_use]
pub fn word(pid: i32, is: impl Fn(&str) -> bool) -> Option<String> {
    words(pid).into_iter().find(|w| is(w))
}

/// Whether a process is a QEMU.
#[must_use]
pub fn is_qemu(pid: i32) -> bool {
    words(pid).first().is_some_and(|w| w.contains("qemu-system-"))
}

/// The processes, other than this one, with a word on their command line that `is` so.
#[must_use]
pub fn with_word(is: impl Fn(&str) -> bool) -> Vec<i32> {
    let me = i32::try_from(std::process::id()).unwrap_or(0);
    let entries = std::fs::read_dir("/proc").expect("reading /proc");
    entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != me && exists(*pid) && words(*pid).iter().any(|w| is(w)))
        .collect()
}

/// The QEMU that the record in `run_dir` names, if it lives and is that one.
#[must_use]
pub fn recorded(run_dir: &Path) -> Option<i32> {
    let text = std::fs::read(run_dir.join("machine.json")).ok()?;
    let record: serde_json::Value = serde_json::from_slice(&text).ok()?;
    let pid = i32::try_from(record["process"]["pid"].as_i64()?).ok()?;
    let began = record["process"]["start_ticks"].as_u64()?;
    (exists(pid) && start_ticks(pid) == Some(began)).then_some(pid)
}

/// When a process began, in ticks since the host did: with its number it is one process for good. (A
/// QEMU that waited has the directory that it waited in on its command line.)
fn start_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program, in brackets, may hold anything; the 22nd field is the 20th after it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

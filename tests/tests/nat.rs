//! A site that nobody can reach: what is not an answer to its own packets is dropped at its door,
//! as NAT and most firewalls do.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::io::Write;
use std::net::UdpSocket;
use std::process::Stdio;
use std::time::Duration;

use godwit_bench::link::Side;
use godwit_tests::{Cloud, Daemon, Setup, kill, within};
use serde_json::Value;

/// What the AP's namespace lets in.
const RULES: &str = "table inet door {
  counter turned_away {}
  chain input {
    type filter hook input priority 0; policy accept;
    iif lo accept
    ct state established,related accept
    meta l4proto udp counter name turned_away drop
  }
}
";

/// Runs `nft` in the AP's network namespace.
fn nft(cloud: &Cloud, args: &[&str], input: &str) -> String {
    let mut command = cloud.net().command(Side::B, "nft");
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "nft {args:?}");
    String::from_utf8(done.stdout).unwrap()
}

/// Packets that were turned away at the AP's door.
fn turned_away(cloud: &Cloud) -> u64 {
    let text = nft(cloud, &["-j", "list", "counters"], "");
    let all: Value = serde_json::from_str(&text).unwrap();
    let all = all["nftables"].as_array().unwrap();
    all.iter().find_map(|c| c["counter"]["packets"].as_u64()).unwrap()
}

fn ended(cloud: &Cloud, op: &str) -> Value {
    within(Duration::from_secs(120), "the move's end", || {
        let o = cloud.op(op);
        (!["running", "cancelling"].contains(&o["state"].as_str()?)).then_some(o)
    })
}

fn moved(cloud: &Cloud, op: &str, to: Daemon, lines: &mut u64) {
    let end = ended(cloud, op);
    assert_eq!(end["state"], "done", "{end}");
    cloud.runs_at("m", to.site());
    *lines = cloud.guest("m").intact(*lines);
}

fn begin(cloud: &Cloud, to: Daemon) -> String {
    let begun = cloud.ok(&["vm", "migrate", "m", "--to", to.site(), "--no-wait"]);
    begun["op"].as_str().unwrap().to_owned()
}

#[test]
fn a_site_behind_nat_is_source_and_destination_of_moves() {
    let setup = Setup::new().over_link(100.0, 10.0).flag(Daemon::Ap, "--behind-nat");
    let mut cloud = setup.center_only();
    // Before it speaks with anybody: the door knows no link that was there before itself.
    nft(&cloud, &["-f", "-"], RULES);
    cloud.join_ap();
    cloud.bring_substrate();
    // The door is shut: a stranger's packet is counted and goes no further.
    let door = (cloud.net().addr_b(), 4242);
    let stranger = || UdpSocket::bind("0.0.0.0:0")?.send_to(b"hello", door);
    cloud.net().enter(Side::A, stranger).unwrap().unwrap();
    let before = within(Duration::from_secs(10), "the door", || {
        Some(turned_away(&cloud)).filter(|n| *n > 0)
    });

    let _ = cloud.ok(&["vm", "activate", "base", "--name", "m", "--site", "center"]);
    let mut lines = cloud.guest("m").intact(0);
    let op = begin(&cloud, Daemon::Ap);
    moved(&cloud, &op, Daemon::Ap, &mut lines);
    let op = begin(&cloud, Daemon::Center);
    moved(&cloud, &op, Daemon::Center, &mut lines);

    // (Whoever is killed below is written to until that is noticed, longer than the door remembers.)
    assert_eq!(turned_away(&cloud), before, "somebody tried to reach the AP");

    // Its relay ends at the commit point: the next one dials, too.
    cloud.hold("relay.committed");
    let op = begin(&cloud, Daemon::Ap);
    kill(cloud.held("relay.committed"));
    cloud.let_go("relay.committed");
    moved(&cloud, &op, Daemon::Ap, &mut lines);
    let op = begin(&cloud, Daemon::Center);
    moved(&cloud, &op, Daemon::Center, &mut lines);

    // The center, which is the source, ends before it has told the AP where to dial: the move is
    // taken back, and the next one goes well.
    cloud.hold("meet.dial");
    let op = begin(&cloud, Daemon::Ap);
    let _ = cloud.held("meet.dial");
    cloud.kill(Daemon::Center);
    cloud.let_go("meet.dial");
    cloud.restart_center();
    let end = ended(&cloud, &op);
    assert_eq!(end["state"], "failed", "{end}");
    cloud.runs_at("m", "center");
    lines = cloud.guest("m").intact(lines);
    within(Duration::from_secs(90), "the AP to be back", || {
        let sites = cloud.ok(&["site", "list"]);
        let cafe = sites.as_array()?.iter().find(|s| s["name"] == "cafe")?;
        (cafe["state"] == "ready").then_some(())
    });
    let op = begin(&cloud, Daemon::Ap);
    moved(&cloud, &op, Daemon::Ap, &mut lines);
}

//! The emulator's accuracy on real TUN devices and namespaces (root needed). Figures are medians
//! of many tries, since the machine may be busy.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that shows its figures")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use godwit_bench::link::{Link, LinkError, LinkHandle, LinkSpec, Side, sweep};
use godwit_types::Name;

fn name(s: &str) -> Name {
    Name::new(&format!("{s}-{}", std::process::id())).unwrap()
}

fn link(what: &str, rate: f64, delay: f64) -> LinkHandle {
    Link::create(LinkSpec::new(name(what), rate, delay)).unwrap()
}

/// With a queue that holds TCP's whole overshoot, so that the rate alone is measured.
fn patient_link(what: &str, rate: f64, delay: f64) -> LinkHandle {
    let spec = LinkSpec::new(name(what), rate, delay);
    Link::create(spec.both(|l| l.queue_ms = 2000.0)).unwrap()
}

fn udp(link: &LinkHandle, side: Side) -> UdpSocket {
    let s = link.enter(side, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 9000))).unwrap().unwrap();
    s.connect((link.addr(side.other()), 9000)).unwrap();
    s.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    s
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

/// Round trips of a small datagram in ms, echoed by a thread at the far side.
fn round_trips(link: &LinkHandle, n: usize) -> Vec<f64> {
    let (a, b) = (udp(link, Side::A), udp(link, Side::B));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buf = [0; 64];
            for _ in 0..n {
                let len = b.recv(&mut buf).unwrap();
                b.send(&buf[..len]).unwrap();
            }
        });
        (0..n)
            .map(|_| {
                let t = Instant::now();
                a.send(b"ping").unwrap();
                a.recv(&mut [0; 64]).unwrap();
                t.elapsed().as_secs_f64() * 1e3
            })
            .collect()
    })
}

/// Moves `bytes` over TCP from A to B; gives Mbit/s of payload between the first and last byte.
fn tcp_rate(link: &LinkHandle, bytes: usize) -> f64 {
    let listener =
        link.enter(Side::B, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9001))).unwrap().unwrap();
    let addr = link.addr_b();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut s = link.enter(Side::A, || TcpStream::connect((addr, 9001))).unwrap().unwrap();
            s.write_all(&vec![7; bytes]).unwrap();
        });
        let (mut s, _) = listener.accept().unwrap();
        s.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut buf = vec![0; 256 << 10];
        // Slow start is over after the first half; the second half runs at the link's pace.
        let (mut got, mut from) = (0, None);
        loop {
            let n = s.read(&mut buf).unwrap();
            if n == 0 {
                break;
            }
            got += n;
            if from.is_none() && got >= bytes / 2 {
                from = Some((Instant::now(), got));
            }
        }
        assert_eq!(got, bytes);
        let (t, half) = from.unwrap();
        (got - half) as f64 * 8.0 / t.elapsed().as_secs_f64() / 1e6
    })
}

/// The best of a few tries, until one reaches `enough` Mbit/s: a machine that is busy elsewhere can
/// keep TCP below the link's rate, but nothing may bring it above.
fn best_tcp_rate(link: &LinkHandle, bytes: usize, enough: f64) -> f64 {
    let mut best = 0.0;
    for _ in 0..5 {
        best = tcp_rate(link, bytes).max(best);
        if best >= enough {
            break;
        }
    }
    best
}

#[test]
fn a_round_trip_takes_what_was_asked_for() {
    let link = link("rtt", 100.0, 17.5);
    let rtt = median(round_trips(&link, 40));
    println!("rtt median {rtt:.3} ms");
    assert!((35.0..39.0).contains(&rtt), "median {rtt} ms");
}

#[test]
fn tcp_comes_near_the_rate() {
    let link = patient_link("tcp", 100.0, 5.0);
    let cpu = thread_cpu_ms("link-");
    let t = Instant::now();
    let rate = best_tcp_rate(&link, 24 << 20, 80.0);
    let share = (thread_cpu_ms("link-") - cpu) / t.elapsed().as_secs_f64() / 10.0;
    println!("tcp {rate:.1} Mbit/s, emulator {share:.1} % of a core, {:?}", link.counters());
    // 1460 of 1500 bytes are payload: 97.3 Mbit/s at best.
    assert!((80.0..98.5).contains(&rate), "{rate} Mbit/s");
}

#[test]
fn a_flood_is_held_to_the_rate_and_the_rest_is_dropped() {
    let link = link("udp", 50.0, 2.0);
    let (a, b) = (udp(&link, Side::A), udp(&link, Side::B));
    b.set_nonblocking(true).unwrap();
    let payload = [0u8; 1472];
    let mut buf = [0u8; 2048];
    let (mut got, mut first) = (0usize, None);
    let start = Instant::now();
    // About 80 Mbit/s offered for a second and a half.
    while start.elapsed() < Duration::from_millis(1500) {
        for _ in 0..10 {
            let _ = a.send(&payload);
        }
        while let Ok(n) = b.recv(&mut buf) {
            first.get_or_insert_with(Instant::now);
            got += n + 28;
        }
        std::thread::sleep(Duration::from_micros(1400));
    }
    let rate = got as f64 * 8.0 / first.unwrap().elapsed().as_secs_f64() / 1e6;
    let c = link.counters().a_to_b;
    println!("udp {rate:.1} Mbit/s, {c:?}");
    // The first packet's bits count, but not its time on the line: a little above is right.
    assert!((45.0..51.5).contains(&rate), "{rate} Mbit/s");
    assert!(c.dropped > 0);
    assert!(c.queue_high_bytes <= link.spec().a_to_b.queue_limit_bytes());
}

#[test]
fn loss_comes_near_its_share() {
    let spec = LinkSpec::new(name("loss"), 1000.0, 1.0);
    let mut spec = spec.both(|l| l.loss = 0.05);
    spec.b_to_a.loss = 0.0;
    let link = Link::create(spec).unwrap();
    let (a, b) = (udp(&link, Side::A), udp(&link, Side::B));
    b.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let n = 6000;
    let got = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while b.recv(&mut [0; 64]).is_ok() {
                got.fetch_add(1, Ordering::Relaxed);
            }
        });
        for i in 0..n {
            // Never more under way than the reader's socket holds: what is lost shall be lost by
            // the link, not by a reader that waits for a processor.
            let sent = Instant::now();
            while got.load(Ordering::Relaxed) + link.counters().a_to_b.lost + 100 < i {
                assert!(sent.elapsed() < Duration::from_secs(20), "packets went missing");
                std::thread::sleep(Duration::from_micros(200));
            }
            a.send(b"x").unwrap();
        }
    });
    let got = got.into_inner();
    let c = link.counters().a_to_b;
    println!("{got} of {n} came, {c:?}");
    assert_eq!(c.lost + c.delivered, c.offered);
    // Five standard deviations of a binomial with n = 6000 and p = 0.05.
    assert!((215..=385).contains(&c.lost), "{} of {n} lost", c.lost);
    assert_eq!(got, c.delivered);
}

#[test]
fn a_cut_silences_the_link_and_tcp_survives_it() {
    let link = link("cut", 100.0, 5.0);
    let (a, b) = (udp(&link, Side::A), udp(&link, Side::B));
    b.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    link.cut(None);
    a.send(b"into the void").unwrap();
    assert!(link.is_cut());
    assert!(b.recv(&mut [0; 64]).is_err(), "nothing crosses a cut link");
    link.restore();
    a.send(b"again").unwrap();
    assert_eq!(b.recv(&mut [0; 64]).unwrap(), 5);
    assert_eq!(link.counters().a_to_b.cut, 1);

    let t = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // In the midst of the transfer.
            while link.counters().a_to_b.delivered < 1000 {
                assert!(t.elapsed() < Duration::from_secs(20), "the transfer does not begin");
                std::thread::sleep(Duration::from_millis(5));
            }
            link.cut(Some(Duration::from_secs(1)));
        });
        tcp_rate(&link, 8 << 20);
    });
    assert!(t.elapsed() > Duration::from_secs(1), "the cut was felt");
    assert!(!link.is_cut());
}

#[test]
fn a_new_rate_is_felt_at_once() {
    let link = patient_link("set", 100.0, 2.0);
    let mut lane = link.lane(Side::A);
    lane.rate_mbit = 20.0;
    link.set(Side::A, lane).unwrap();
    let rate = best_tcp_rate(&link, 4 << 20, 15.0);
    println!("tcp {rate:.1} Mbit/s of 20");
    assert!((15.0..19.9).contains(&rate), "{rate} Mbit/s");
    lane.loss = 1.5;
    assert!(matches!(link.set(Side::A, lane), Err(LinkError::Spec { what: "loss", .. })));
}

#[test]
fn processes_run_inside_and_nothing_is_left_behind() {
    let link = link("clean", 100.0, 1.0);
    let (ns_a, ns_b) = (link.ns_a(), link.ns_b());
    let out = link.command(Side::B, "ip").args(["-br", "addr"]).output().unwrap();
    assert!(String::from_utf8_lossy(&out.stdout).contains("10.77.0.2/24"));
    let again = Link::create(link.spec().clone());
    assert!(matches!(again, Err(LinkError::Busy(_))), "{again:?}");
    drop(link);
    for ns in [ns_a, ns_b] {
        assert!(!std::path::Path::new("/run/netns").join(ns).exists());
    }
}

#[test]
fn a_killed_emulators_leftovers_are_cleared() {
    let name = name("killed");
    let mut child = Command::new(env!("CARGO_BIN_EXE_godwit-bench"))
        .args(["link", "--up", "--rate", "10", "--delay", "1", "--name", name.as_str()])
        .spawn()
        .unwrap();
    let socket = godwit_bench::link::control_path(&name);
    let deadline = Instant::now() + Duration::from_secs(20);
    while godwit_bench::link::request(&socket, &godwit_bench::link::Request::Status).is_err() {
        assert!(Instant::now() < deadline, "the emulator came up");
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let ns = std::path::PathBuf::from(format!("/run/netns/gw-{name}-a"));
    assert!(ns.exists(), "SIGKILL leaves the namespace");
    // Another test may sweep at the same moment, so only the state counts, not who did it.
    sweep().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while ns.exists() {
        assert!(Instant::now() < deadline, "the namespace was cleared");
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = std::fs::remove_file(socket);
}

#[test]
fn the_command_line_cuts_and_ends_cleanly_on_sigterm() {
    let name = name("cli");
    let bench = env!("CARGO_BIN_EXE_godwit-bench");
    let mut child = Child(
        Command::new(bench)
            .args(["link", "--up", "--rate", "10", "--delay", "1", "--name", name.as_str()])
            .spawn()
            .unwrap(),
    );
    let run = |args: &[&str]| {
        let mut c = Command::new(bench);
        c.args(["link", "--name", name.as_str()]).args(args).output().unwrap()
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while !run(&["--status"]).status.success() {
        assert!(Instant::now() < deadline, "the emulator came up");
    }
    let out = run(&["--cut", "60"]);
    let reply: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(reply["state"]["cut"], true, "{reply}");
    let reply: serde_json::Value =
        serde_json::from_slice(&run(&["--set", "--rate", "25"]).stdout).unwrap();
    assert_eq!(reply["state"]["b_to_a"]["rate_mbit"], 25.0, "{reply}");
    let reply: serde_json::Value = serde_json::from_slice(&run(&["--restore"]).stdout).unwrap();
    assert_eq!(reply["state"]["cut"], false, "{reply}");
    // SAFETY: the child is ours and not yet waited for, so its id cannot be another's.
    unsafe { libc::kill(i32::try_from(child.0.id()).unwrap(), libc::SIGTERM) };
    assert!(child.0.wait().unwrap().success());
    assert!(!std::path::Path::new(&format!("/run/netns/gw-{name}-a")).exists());
}

/// Ends the process when a test fails half-way.
struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Processor time in ms of this process's threads whose name starts with `prefix`.
fn thread_cpu_ms(prefix: &str) -> f64 {
    let mut ticks = 0.0;
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else { continue };
        let (head, tail) = stat.rsplit_once(')').unwrap();
        if head.split_once('(').unwrap().1.starts_with(prefix) {
            let f: Vec<&str> = tail.split_whitespace().collect();
            ticks += f[11].parse::<f64>().unwrap() + f[12].parse::<f64>().unwrap();
        }
    }
    ticks * 10.0
}

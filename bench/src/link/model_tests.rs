use proptest::prelude::*;

use super::*;
use godwit_types::Name;

const MS: u64 = 1_000_000;

fn spec(rate: f64, delay: f64) -> LinkSpec {
    LinkSpec::new(Name::new("t").expect("a name"), rate, delay)
}

/// Runs the model dry and gives (time, side, packet) of what comes out.
fn drain(m: &mut Model<u32>, out: &mut Vec<(u64, Side, u32)>) {
    while let Some(t) = m.next_event() {
        while let Some((side, p)) = m.poll(t) {
            out.push((t, side, p));
        }
    }
}

#[test]
fn a_packet_takes_its_time_on_the_line_and_the_delay() {
    let mut m = Model::new(&spec(100.0, 17.5));
    m.offer(0, Side::A, 7, 1500);
    let mut out = Vec::new();
    drain(&mut m, &mut out);
    // 1500 bytes at 100 Mbit/s are 120 us.
    assert_eq!(out, [(120_000 + 17 * MS + MS / 2, Side::B, 7)]);
    assert_eq!(m.poll(u64::MAX), None);
}

#[test]
fn the_directions_do_not_share_the_line() {
    let mut m = Model::new(&spec(8.0, 1.0));
    for i in 0..10 {
        m.offer(0, Side::A, i, 1000);
    }
    m.offer(0, Side::B, 99, 1000);
    let mut out = Vec::new();
    drain(&mut m, &mut out);
    assert!(out.contains(&(2 * MS, Side::A, 99)));
    assert!(out.contains(&(11 * MS, Side::B, 9)));
}

#[test]
fn a_full_queue_drops_the_newest() {
    // 1 ms at 8 Mbit/s is one packet of 1000 bytes.
    let mut m = Model::new(&spec(8.0, 0.0).both(|l| l.queue_ms = 2.0));
    for i in 0..5 {
        m.offer(0, Side::A, i, 1000);
    }
    let c = m.counters().a_to_b;
    assert_eq!((c.offered, c.dropped, c.queue_high_bytes), (5, 3, 2000));
    assert_eq!(m.take_freed(), Some(4));
}

#[test]
fn a_change_of_rate_reaches_the_packet_on_the_line() {
    let mut m = Model::new(&spec(8.0, 0.0));
    m.offer(0, Side::A, 1, 1000);
    // Half of it is out after half a millisecond; the rest takes ten times as long.
    m.set(MS / 2, Side::A, LaneSpec::new(0.8, 0.0));
    let mut out = Vec::new();
    drain(&mut m, &mut out);
    assert_eq!(out, [(MS / 2 + 5 * MS, Side::B, 1)]);
}

#[test]
fn a_cut_loses_what_is_under_way_and_what_comes() {
    let mut m = Model::new(&spec(8.0, 10.0));
    m.offer(0, Side::A, 1, 1000); // Comes out at 11 ms.
    m.offer(0, Side::A, 2, 1000); // Would come out at 12 ms.
    m.cut(11 * MS, Some(Duration::from_millis(5)));
    m.offer(15 * MS, Side::A, 3, 1000);
    assert!(m.is_cut(16 * MS - 1));
    m.offer(16 * MS, Side::A, 4, 1000);
    let mut out = Vec::new();
    drain(&mut m, &mut out);
    assert_eq!(out.iter().map(|o| o.2).collect::<Vec<_>>(), [1, 4]);
    assert_eq!(m.counters().a_to_b.cut, 2);
}

#[test]
fn planned_outages_begin_and_end_by_themselves() {
    let mut s = spec(8.0, 0.0);
    s.outages = vec![
        crate::link::Outage { start_ms: 20.0, for_ms: 10.0 },
        crate::link::Outage { start_ms: 5.0, for_ms: 2.0 },
    ];
    let mut m = Model::new(&s);
    let mut out = Vec::new();
    for i in 0..40 {
        m.offer(u64::from(i) * MS + 1, Side::A, i, 100);
        while let Some((_, p)) = m.poll(u64::from(i) * MS + MS / 2) {
            out.push(p);
        }
    }
    let want: Vec<u32> = (0..5).chain(7..20).chain(30..40).collect();
    assert_eq!(out, want);
}

#[test]
fn a_cut_without_an_end_lasts_until_restored() {
    let mut m = Model::new(&spec(8.0, 0.0));
    m.cut(0, None);
    m.offer(1000 * MS, Side::B, 1, 100);
    assert!(m.is_cut(u64::MAX / 2));
    m.restore(u64::MAX / 2);
    assert!(!m.is_cut(u64::MAX / 2));
    assert_eq!(m.counters().b_to_a.cut, 1);
}

#[test]
fn loss_comes_near_its_share_and_is_the_same_for_one_seed() {
    let run = |seed| {
        let mut s = spec(1000.0, 1.0).both(|l| l.loss = 0.02);
        s.seed = seed;
        let mut m = Model::new(&s);
        for i in 0..50_000u32 {
            m.offer(u64::from(i) * MS, Side::A, i, 1500);
        }
        let mut out = Vec::new();
        drain(&mut m, &mut out);
        (m.counters().a_to_b.lost, out)
    };
    let (lost, out) = run(3);
    // Four standard deviations of a binomial with n = 50 000 and p = 0.02.
    assert!((875..=1125).contains(&lost), "{lost} of 50000 lost");
    assert_eq!(run(3), (lost, out.clone()));
    assert_ne!(run(4).1, out);
}

#[derive(Debug, Clone)]
enum Step {
    Offer { wait_us: u32, bytes: u32, from_b: bool },
    Poll { wait_us: u32 },
    Cut { ms: u32 },
    Rate { mbit: f64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..2000u32, 20..1500u32, any::<bool>())
            .prop_map(|(wait_us, bytes, from_b)| Step::Offer { wait_us, bytes, from_b }),
        3 => (0..20_000u32).prop_map(|wait_us| Step::Poll { wait_us }),
        1 => (0..30u32).prop_map(|ms| Step::Cut { ms }),
        1 => (1..200u32).prop_map(|m| Step::Rate { mbit: f64::from(m) }),
    ];
    proptest::collection::vec(step, 1..300)
}

proptest! {
    /// Whatever happens, each packet ends in exactly one place, none overtakes another, and none
    /// comes out twice or before its delay.
    #[test]
    fn packets_are_conserved_and_keep_their_order(
        steps in steps(), loss in 0.0..0.3f64, jitter in 0.0..20.0f64, seed in any::<u64>(),
    ) {
        let mut s = spec(20.0, 5.0).both(|l| { l.loss = loss; l.jitter_ms = jitter; l.queue_ms = 8.0; });
        s.seed = seed;
        let mut m = Model::new(&s);
        let (mut now, mut id) = (0u64, 0u32);
        let mut sent = Vec::new();
        let mut out = Vec::new();
        let mut freed = 0u64;
        for step in steps {
            match step {
                Step::Offer { wait_us, bytes, from_b } => {
                    now += u64::from(wait_us) * 1000;
                    sent.push(now);
                    m.offer(now, if from_b { Side::B } else { Side::A }, id, bytes);
                    id += 1;
                }
                Step::Poll { wait_us } => {
                    now += u64::from(wait_us) * 1000;
                    while let Some((side, p)) = m.poll(now) { out.push((now, side, p)); }
                }
                Step::Cut { ms } => m.cut(now, Some(Duration::from_millis(u64::from(ms)))),
                Step::Rate { mbit } => {
                    let lane = LaneSpec { rate_mbit: mbit, ..m.lane(Side::A) };
                    m.set(now, Side::A, lane);
                }
            }
            while m.take_freed().is_some() { freed += 1; }
            let c = m.counters();
            let sum: u64 = [c.a_to_b, c.b_to_a].iter()
                .map(|l| l.delivered + l.dropped + l.lost + l.cut).sum();
            prop_assert_eq!(sum + m.held() as u64, u64::from(id));
            prop_assert_eq!(freed + out.len() as u64 + m.held() as u64, u64::from(id));
        }
        while let Some((side, p)) = m.poll(now) { out.push((now, side, p)); }
        drain(&mut m, &mut out);
        prop_assert_eq!(m.held(), 0);
        for side in Side::BOTH {
            let ids: Vec<u32> = out.iter().filter(|o| o.1 == side).map(|o| o.2).collect();
            prop_assert!(ids.is_sorted_by(|a, b| a < b), "order at {:?}: {:?}", side, ids);
        }
        for (at, _, p) in out {
            prop_assert!(at >= sent[p as usize] + 5 * MS);
        }
    }

    /// Over any span of time, no more bits come out of a direction than its rate allows.
    #[test]
    fn the_rate_is_never_exceeded(
        packets in proptest::collection::vec((0..300u32, 20..1500u32), 1..200),
        rate in 1.0..500.0f64,
    ) {
        let mut m = Model::new(&spec(rate, 3.0));
        let (mut now, mut sizes) = (0u64, Vec::new());
        let mut out = Vec::new();
        for (i, (wait_us, bytes)) in packets.into_iter().enumerate() {
            now += u64::from(wait_us) * 1000;
            while let Some(t) = m.next_event().filter(|t| *t <= now) {
                while let Some((side, p)) = m.poll(t) { out.push((t, side, p)); }
            }
            m.offer(now, Side::A, i as u32, bytes);
            sizes.push(bytes);
        }
        drain(&mut m, &mut out);
        for (i, first) in out.iter().enumerate() {
            let mut bits = 0.0;
            for later in &out[i + 1..] {
                bits += f64::from(sizes[later.2 as usize]) * 8.0;
                let allowed = (later.0 - first.0) as f64 * 1e-3 * rate;
                prop_assert!(bits <= allowed * 1.000_001 + 0.01, "{bits} bits, {allowed} allowed");
            }
        }
    }

    /// A backlog drains at exactly the rate: the line is never idle while something waits.
    #[test]
    fn the_line_is_never_idle_while_packets_wait(n in 1..200u64, bytes in 20..1500u32) {
        let mut m = Model::new(&spec(50.0, 2.0).both(|l| l.queue_ms = 1000.0));
        for i in 0..n { m.offer(0, Side::A, i as u32, bytes); }
        let mut out = Vec::new();
        drain(&mut m, &mut out);
        let want = n * service_ns(bytes, 50_000_000) + 2 * MS;
        prop_assert_eq!(out.last().map(|o| o.0), Some(want));
    }
}

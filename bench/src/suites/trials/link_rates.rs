//! What a link carries at a rate, a delay and a loss, and how long a small message takes beside it.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use godwit_transfer::keys::PendingIdentity;
use godwit_transfer::{
    Authority, Congestion, Endpoint, EndpointOptions, LaneKind, Link, Priority, Trust,
};
use godwit_types::{Name, SiteKind};

use super::quantile;
use crate::harness::{Better, Experiment, LinkInfo, Results, Table};
use crate::link::{LaneSpec, Link as Emulated, LinkHandle, LinkSpec, Side};

/// What is to be tried.
#[derive(Debug, Clone)]
pub struct LinkRates {
    /// Rate of the link in Mbit/s.
    pub rate_mbit: f64,
    /// One-way delay in ms.
    pub delay_ms: f64,
    /// Shares of packets lost, each way.
    pub losses: Vec<f64>,
    /// How long each is measured, after one second to begin.
    pub time: Duration,
    /// Rounds.
    pub rounds: usize,
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
struct Rate {
    mbit: f64,
    /// The same of what was beside it.
    other_mbit: Option<f64>,
    /// Round trip of a message on the control lane beside it, in ms: median and 0.99.
    echo_ms: [f64; 2],
}

/// Runs the trial.
///
/// # Errors
/// When no link can be made, or one does not carry anything.
pub async fn link_rates(trial: &LinkRates, results: &mut Results) -> anyhow::Result<()> {
    let all = [("model", Congestion::Model), ("cubic", Congestion::Cubic)];
    let alone = trial.losses.iter().flat_map(|loss| all.map(|(name, c)| (*loss, name, c, None)));
    let pairs = [(0, 0), (0, 1), (1, 1)].map(|(a, b)| (0.0, all[a].0, all[a].1, Some(all[b])));
    let mut rows = Vec::new();
    let mut rates = Experiment::new(
        "carries",
        "Bytes delivered on a bulk lane; 'beside': while another link carries as much as it can.",
        "Mbit/s",
        Better::Higher,
    );
    let mut echoes = Experiment::new(
        "message",
        "A control message to the other site and back meanwhile.",
        "ms",
        Better::Lower,
    );
    for (loss, name, congestion, beside) in alone.chain(pairs) {
        let lost = format!("{:.0} %", loss * 100.0);
        let label = match beside {
            Some((other, _)) => format!("{name} beside {other}"),
            None => format!("{name}, {lost} lost"),
        };
        let mut seen = Vec::new();
        for round in 0..trial.rounds {
            let beside = beside.map(|(_, c)| c);
            let rate = measure(trial, loss, congestion, beside, round as u64).await?;
            rates.push(&label, rate.mbit);
            echoes.push(&label, rate.echo_ms[0]);
            seen.push(rate);
        }
        let median = |of: fn(&Rate) -> f64| {
            let mut all: Vec<f64> = seen.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            quantile(&all, 0.5).unwrap_or_default()
        };
        rows.push(vec![
            lost,
            name.to_owned(),
            beside.map_or("nothing", |(other, _)| other).to_owned(),
            format!("{:.1} Mbit/s", median(|r| r.mbit)),
            match beside {
                Some(_) => format!("{:.1} Mbit/s", median(|r| r.other_mbit.unwrap_or_default())),
                None => String::new(),
            },
            format!("{:.0} ms", median(|r| r.echo_ms[0])),
            format!("{:.0} ms", median(|r| r.echo_ms[1])),
        ]);
    }
    let link = LinkSpec::new(Name::new("rates")?, trial.rate_mbit, trial.delay_ms);
    results.link = Some(LinkInfo::from(&link));
    results.tables.push(Table {
        name: "link-rates".into(),
        about: format!(
            "{} Mbit/s, {} ms each way, a queue of 50 ms; packets are lost both ways.",
            trial.rate_mbit, trial.delay_ms
        ),
        head: ["lost", "control", "beside", "carries", "the other", "message, median", "its 0.99"]
            .map(String::from)
            .to_vec(),
        rows,
    });
    results.experiments.extend([rates, echoes]);
    Ok(())
}

/// One direction of two sites' link, and one of others beside it.
async fn measure(
    trial: &LinkRates,
    loss: f64,
    congestion: Congestion,
    beside: Option<Congestion>,
    seed: u64,
) -> anyhow::Result<Rate> {
    let mut spec = LinkSpec::new(Name::new("rates")?, trial.rate_mbit, trial.delay_ms)
        .both(|lane: &mut LaneSpec| lane.loss = loss);
    spec.seed = seed + 1;
    let emulated = Emulated::create(spec)?;
    let dir = tempfile::tempdir()?;
    let authority = Authority::create(&dir.path().join("authority"))?;
    let one = sites(&emulated, &authority, congestion, 7400).await?;
    let Some(beside) = beside else { return one.carry(trial.time).await };
    let other = sites(&emulated, &authority, beside, 7500).await?;
    // The other one is there first.
    let longer = trial.time + Duration::from_secs(2);
    let other = tokio::spawn(async move { other.carry(longer).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let rate = one.carry(trial.time).await?;
    let other = other.await??;
    Ok(Rate { other_mbit: Some(other.mbit), ..rate })
}

/// Two sites with a link.
struct Sites {
    out: Link,
    come: Link,
    _endpoints: [Endpoint; 2],
}

async fn sites(
    emulated: &LinkHandle,
    authority: &Authority,
    congestion: Congestion,
    port: u16,
) -> anyhow::Result<Sites> {
    let bind = async |side: Side, address: Ipv4Addr, site: &str| {
        let name = Name::new(site)?;
        let pending = PendingIdentity::make(&name, SiteKind::Ap)?;
        let certificate = authority.issue_for(pending.request(), &name, SiteKind::Ap, 3600)?;
        let identity = pending.complete(&certificate, authority.certificate())?;
        let trust = Trust::new(identity.authority(), godwit_transfer::Revocations::default())?;
        let options = EndpointOptions { congestion, ..EndpointOptions::default() };
        let address = SocketAddr::from((address, port));
        let bound = async { Endpoint::bind(address, identity, trust, options) };
        anyhow::Ok(emulated.within(side, bound)?.await??)
    };
    let spec = LinkSpec::new(Name::new("rates")?, 1.0, 1.0);
    let from = bind(Side::A, spec.addr_a, "from").await?;
    let to = bind(Side::B, spec.addr_b, "to").await?;
    let out = from.connect((spec.addr_b, port).into(), None).await?;
    let come = to.accept().await.context("a link comes")?;
    Ok(Sites { out, come, _endpoints: [from, to] })
}

impl Sites {
    async fn carry(self, time: Duration) -> anyhow::Result<Rate> {
        let rate = carry(&self.out, &self.come, time).await;
        self.out.close("measured");
        rate
    }
}

/// Fills a bulk lane from `out` to `come`, and sends small messages to and fro beside it.
async fn carry(out: &Link, come: &Link, time: Duration) -> anyhow::Result<Rate> {
    const FRAME: usize = 64 << 10;
    let mut bulk = out.open(LaneKind::MemoryBulk, Priority::Bulk).await?;
    let mut control = out.open(LaneKind::Steering, Priority::Control).await?;
    let (mut first, mut second) = (come.accept_lane().await?, come.accept_lane().await?);
    if first.kind() != LaneKind::MemoryBulk {
        std::mem::swap(&mut first, &mut second);
    }
    let fill = tokio::spawn(async move {
        let frame = Bytes::from(vec![0x5a; FRAME]);
        while bulk.send_bytes(frame.clone()).await.is_ok() {}
    });
    let answer = tokio::spawn(async move {
        while let Ok(Some(message)) = second.recv().await {
            if second.send_bytes(message).await.is_err() {
                break;
            }
        }
    });
    let begun = Instant::now() + Duration::from_secs(1);
    let ends = begun + time;
    let count = tokio::spawn(async move {
        let mut bytes = 0u64;
        while let Ok(Ok(Some(frame))) = tokio::time::timeout_at(ends.into(), first.recv()).await {
            if Instant::now() >= begun {
                bytes += frame.len() as u64;
            }
        }
        bytes
    });
    let mut echoes = Vec::new();
    tokio::time::sleep_until(begun.into()).await;
    while Instant::now() < ends {
        let sent = Instant::now();
        control.send(b"ping").await?;
        control.recv().await?.context("an answer")?;
        echoes.push(sent.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let bytes = count.await?;
    fill.abort();
    answer.abort();
    echoes.sort_by(f64::total_cmp);
    let at = |q| quantile(&echoes, q).unwrap_or_default();
    Ok(Rate {
        mbit: bytes as f64 * 8.0 / 1e6 / time.as_secs_f64(),
        other_mbit: None,
        echo_ms: [at(0.5), at(0.99)],
    })
}

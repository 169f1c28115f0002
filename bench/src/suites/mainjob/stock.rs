//! The rival: stock QEMU, as libvirt's `--copy-storage-inc` drives it.
//!
//! ```text
//! source                                   destination (-incoming)
//!                                          NBD server: its empty cow image, writable
//! mirror what the cow image holds -------> (until the mirror is ready)
//! pre-copy the memory -------------------> (rounds until the rest fits the downtime limit)
//! STOP, device state held back
//! end the mirror gracefully -------------> (both disks are equal now)
//! device state --------------------------> close the NBD server, RESUME
//! ```
//!
//! Both ends share the base image, as with Godwit. QEMU's defaults stay, but for the bandwidth
//! limit, which is lifted so that only the link limits it.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use godwit_qemu::{Capability, Machine, MigrationStatus, Parameters};
use godwit_types::{BytesMoved, ClockOffset, MovePhase, MoveReport, PagesMoved, Phases};
use serde_json::{Value, json};

use crate::link::{Counters, LinkHandle};

const NBD_PORT: u16 = 10_809;
const MIGRATION_PORT: u16 = 49_152;
const SHORT: Duration = Duration::from_secs(30);

/// What one move by stock QEMU took.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct StockReport {
    /// In Godwit's own terms, with the scheme `stock`.
    #[serde(flatten)]
    pub report: MoveReport,
    /// Bytes that both ends put on the link, headers and acknowledgements included.
    pub wire_bytes: u64,
    /// Rounds of pre-copy that QEMU says it took.
    pub bitmap_syncs: u64,
}

fn inet(link: &LinkHandle, port: u16) -> Value {
    json!({ "type": "inet", "host": link.addr_b().to_string(), "port": port.to_string() })
}

async fn command(machine: &Machine, name: &str, arguments: Value) -> anyhow::Result<Value> {
    machine
        .qmp_client()
        .execute(name, arguments)
        .await
        .with_context(|| format!("stock QEMU's command {name}"))
}

/// Moves the machine `source`, which runs in the link's namespace A, into `destination`, which
/// waits for it in namespace B and has the same base image under an empty cow image. It may end its
/// pre-copy when the rest takes less than `downtime_limit_ms`; none: QEMU's default.
///
/// # Errors
/// When QEMU refuses a step, or pre-copy has not converged within `within`; the migration is
/// cancelled then and the machine goes on at the source.
pub async fn migrate(
    link: &LinkHandle,
    source: &Machine,
    destination: &Machine,
    downtime_limit_ms: Option<u64>,
    within: Duration,
) -> anyhow::Result<StockReport> {
    let before = link.counters();
    let mut source_events = source.events();
    let mut stops = source.events();
    let mut events_there = destination.events();
    let mut phases = Phases::start();
    let asked = Instant::now();

    let disk = source.launch().disk.is_some();
    if disk {
        let address = json!({ "type": "inet", "data": {
            "host": link.addr_b().to_string(), "port": NBD_PORT.to_string() } });
        command(destination, "nbd-server-start", json!({ "addr": address })).await?;
        let export = json!({ "type": "nbd", "id": "mirror", "node-name": "top", "name": "top",
            "writable": true });
        command(destination, "block-export-add", export).await?;
    }
    let capabilities = [Capability::PauseBeforeSwitchover];
    destination.set_capabilities(&capabilities).await?;
    source.set_capabilities(&capabilities).await?;
    let limits = Parameters { max_bandwidth: Some(0), downtime_limit_ms, ..Parameters::default() };
    source.set_parameters(limits).await?;
    phases.end(phase(MovePhase::Prepare));

    if disk {
        let target = json!({ "driver": "nbd", "node-name": "mirror-target", "export": "top",
            "server": inet(link, NBD_PORT) });
        command(source, "blockdev-add", target).await?;
        let mirror = json!({ "job-id": "mirror", "device": "top", "target": "mirror-target",
            "sync": "top" });
        command(source, "blockdev-mirror", mirror).await?;
        let event = source_events
            .wait_for("the mirror's being ready", within, |e| {
                e.name == "BLOCK_JOB_READY" || e.name == "BLOCK_JOB_COMPLETED"
            })
            .await?;
        if event.name == "BLOCK_JOB_COMPLETED" {
            bail!("the disk mirror failed: {}", event.data);
        }
        phases.end("disk-mirror");
    }

    let channel = json!([{ "channel-type": "main", "addr": {
        "transport": "socket", "type": "inet",
        "host": link.addr_b().to_string(), "port": MIGRATION_PORT.to_string() } }]);
    command(destination, "migrate-incoming", json!({ "channels": channel })).await?;
    command(source, "migrate", json!({ "channels": channel })).await?;
    let left = within.saturating_sub(asked.elapsed());
    let paused = source_events
        .wait_for("the end of pre-copy", left, |e| {
            matches!(e.migration_status(), Some("pre-switchover" | "failed"))
        })
        .await;
    match paused {
        Ok(e) if e.migration_status() == Some("pre-switchover") => {}
        Ok(_) => bail!("stock migration failed: {:?}", source.query_migrate().await?.error),
        Err(e) => {
            source.migrate_cancel().await?;
            return Err(e).context("stock pre-copy did not converge");
        }
    }
    phases.end(phase(MovePhase::PreCopy));

    let mut disk_bytes = 0;
    if disk {
        command(source, "block-job-cancel", json!({ "device": "mirror" })).await?;
        // A mirror that was ready ends gracefully: all it had is at the destination.
        let done = source_events.wait_named("BLOCK_JOB_COMPLETED", SHORT).await?;
        if let Some(why) = done.data.get("error") {
            bail!("the disk mirror failed at the switch: {why}");
        }
        disk_bytes = done.data["offset"].as_u64().unwrap_or(0);
    }
    source.migrate_continue().await?;
    destination.wait_migration("stock switch-over", &[MigrationStatus::Completed], SHORT).await?;
    if disk {
        command(destination, "nbd-server-stop", Value::Null).await?;
    }
    destination.run().await?;
    let resumed = events_there.wait_named("RESUME", SHORT).await?;
    phases.end(phase(MovePhase::Freeze));
    let switch_ms = asked.elapsed().as_secs_f64() * 1e3;
    let after = link.counters();

    let info = source
        .wait_migration("stock migration's end", &[MigrationStatus::Completed], SHORT)
        .await?;
    let stats = command(source, "query-migrate", Value::Null).await?;
    let stopped = stops.wait_named("STOP", SHORT).await?.at;
    let (phases, total_ms) = phases.finish();
    Ok(StockReport {
        report: MoveReport {
            from: link.ns_a(),
            to: link.ns_b(),
            scheme: "stock".into(),
            switch_ms,
            downtime_ms: resumed.at.saturating_sub(stopped).as_secs_f64() * 1e3,
            total_ms,
            // Both ends are processes of one host here.
            clock: Some(ClockOffset { offset_ms: 0.0, bound_ms: 0.0 }),
            bytes: BytesMoved { memory: info.transferred, disk: disk_bytes, device_state: 0 },
            pages: PagesMoved {
                data: stats["ram"]["normal"].as_u64().unwrap_or(0),
                zero: stats["ram"]["duplicate"].as_u64().unwrap_or(0),
                ..PagesMoved::default()
            },
            cancelled_blocks: 0,
            phases,
        },
        wire_bytes: wire(&before, &after),
        bitmap_syncs: stats["ram"]["dirty-sync-count"].as_u64().unwrap_or(0),
    })
}

fn wire(before: &Counters, after: &Counters) -> u64 {
    after.offered_bytes() - before.offered_bytes()
}

fn phase(p: MovePhase) -> String {
    serde_json::to_value(p).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

//! Godwit's side, through its command line and nothing else.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use godwit_types::{ActivateReport, DockReport, MoveReport};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::demo::guest::consoles;
use crate::link::LinkHandle;
use crate::prober::{Prober, Signs};
use crate::suites::guest::{WITNESS, Witness};

/// The `godwit` program, speaking to a center.
#[derive(Debug, Clone)]
pub struct GodwitCli {
    /// The program.
    pub program: PathBuf,
    /// Namespace to run it in; none: the present one.
    pub namespace: Option<String>,
    /// Environment, such as the center's address and the operator token.
    pub env: Vec<(String, String)>,
}

impl GodwitCli {
    /// Runs `godwit ARGS... -o json` and reads its answer.
    ///
    /// # Errors
    /// When it cannot be run, takes longer than `within`, fails (with its words) or answers
    /// something else than `T`.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        args: &[&str],
        within: Duration,
    ) -> anyhow::Result<T> {
        let shown = args.join(" ");
        let mut all = args.to_vec();
        // Before a `--`, behind which everything belongs to somebody else.
        let at = all.iter().position(|a| *a == "--").unwrap_or(all.len());
        all.splice(at..at, ["-o", "json"]);
        let out = self.run(&all, within).await?;
        let value: Value = serde_json::from_slice(&out)
            .with_context(|| format!("read the answer of `godwit {shown}`"))?;
        pick(value).with_context(|| format!("find the report in the answer of `godwit {shown}`"))
    }

    /// Runs `godwit ARGS...` and gives what it prints.
    ///
    /// # Errors
    /// As [`GodwitCli::ask`].
    pub async fn run(&self, args: &[&str], within: Duration) -> anyhow::Result<Vec<u8>> {
        let shown = args.join(" ");
        let out = tokio::time::timeout(within, self.command(args).output())
            .await
            .with_context(|| format!("`godwit {shown}` took longer than {within:?}"))?
            .with_context(|| format!("run {}", self.program.display()))?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.success(), "`godwit {shown}` failed: {}", said.trim());
        Ok(out.stdout)
    }

    /// The command `godwit ARGS...`, not started yet; it ends with who holds it.
    pub(crate) fn command(&self, args: &[&str]) -> tokio::process::Command {
        let mut command = match &self.namespace {
            Some(ns) => {
                let mut c = tokio::process::Command::new("ip");
                c.args(["netns", "exec", ns]).arg(&self.program);
                c
            }
            None => tokio::process::Command::new(&self.program),
        };
        command.args(args).envs(self.env.iter().cloned()).kill_on_drop(true);
        command
    }

    /// `godwit vm dock VM --name SUBSTRATE`.
    ///
    /// # Errors
    /// As [`GodwitCli::ask`].
    pub async fn dock(
        &self,
        vm: &str,
        substrate: &str,
        within: Duration,
    ) -> anyhow::Result<DockReport> {
        self.ask(&["vm", "dock", vm, "--name", substrate], within).await
    }

    /// `godwit vm migrate VM --to SITE`.
    ///
    /// # Errors
    /// As [`GodwitCli::ask`].
    pub async fn migrate(
        &self,
        vm: &str,
        site: &str,
        within: Duration,
    ) -> anyhow::Result<MoveReport> {
        self.ask(&["vm", "migrate", vm, "--to", site], within).await
    }

    /// `godwit vm delete VM`.
    ///
    /// # Errors
    /// As [`GodwitCli::ask`].
    pub async fn delete(&self, vm: &str, within: Duration) -> anyhow::Result<Value> {
        self.ask(&["vm", "delete", vm], within).await
    }
}

/// The report itself, or the `report` field of an operation around it.
fn pick<T: DeserializeOwned>(mut value: Value) -> Result<T, serde_json::Error> {
    match value.get_mut("report").map(Value::take) {
        Some(inner) => serde_json::from_value(inner),
        None => serde_json::from_value(value),
    }
}

/// The `godwit` program that was built with this one: beside it or, for a test, one folder up.
///
/// # Errors
/// When it is not there; says how to build it.
pub fn program() -> anyhow::Result<PathBuf> {
    let me = std::env::current_exe().context("find this program")?;
    let places = [me.with_file_name("godwit"), me.parent().unwrap_or(&me).with_file_name("godwit")];
    places.into_iter().find(|p| p.is_file()).with_context(|| {
        format!("no godwit beside {}; build it first: cargo build -p godwit", me.display())
    })
}

/// How often scheme `hybrid` sends a page at most.
pub(crate) const PASSES: u64 = 2;

/// What one round with Godwit found.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct GodwitRound {
    /// `vm create`, from the request until the guest answers.
    pub cold_boot_ms: f64,
    /// `vm dock`.
    pub dock: DockReport,
    /// `vm activate`.
    pub activate: ActivateReport,
    /// Center to AP, and what was seen of it.
    pub there: SeenMove,
    /// The way back.
    pub back: SeenMove,
    /// Another machine of that substrate from center to AP, once the AP holds it, too.
    pub held: SeenMove,
}

/// A move, and what somebody outside saw of it.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct SeenMove {
    /// What Godwit says.
    pub report: MoveReport,
    /// The guest's signs of life.
    pub signs: Signs,
    /// Bytes that both ends put on the link, headers and what was lost included.
    pub link_bytes: u64,
    /// What of the memory that moved is the witness's own noise, at most, before packing.
    pub witness_bytes: u64,
}

/// One round: boots `image` cold at the center, docks it, activates it, moves it to the site `ap` and
/// back to `center`, and moves another one of the substrate there once `ap` holds it, too. Names carry
/// `round`, so that rounds do not meet; the environments are deleted at the end, the substrate stays.
///
/// # Errors
/// The first command that fails.
pub async fn round(
    sites: &super::Sites,
    link: &LinkHandle,
    image: &str,
    witness_mib: u32,
    round: usize,
    within: Duration,
) -> anyhow::Result<GodwitRound> {
    let super::Sites { cli, center, ap, .. } = sites;
    let (first, substrate, moved) =
        (format!("cold-{round}"), format!("bench-{round}"), format!("moved-{round}"));
    let asked = std::time::Instant::now();
    let create = ["vm", "create", "--image", image, "--name", &first, "--site", center];
    cli.ask::<Value>(&create, within).await?;
    let cold_boot_ms = asked.elapsed().as_secs_f64() * 1e3;
    let script = Witness::script(witness_mib);
    let seconds = within.as_secs().to_string();
    let start = ["vm", "exec", "--within", &seconds, &first, "--", "/bin/sh", "-c", &script];
    cli.run(&start, within).await.context("start the witness")?;
    let dock = cli.dock(&first, &substrate, within).await?;
    let activate = ["vm", "activate", &substrate, "--name", &moved, "--site", center];
    let activate: ActivateReport = cli.ask(&activate, within).await?;
    let there = seen_move(sites, link, (&moved, ap), within).await?;
    let back = seen_move(sites, link, (&moved, center), within).await?;
    cli.delete(&moved, within).await?;
    // To activate one there brings the substrate.
    let other = format!("other-{round}");
    let bring = ["vm", "activate", &substrate, "--name", &other, "--site", ap];
    cli.ask::<ActivateReport>(&bring, within).await.context("bring the substrate to the AP")?;
    cli.delete(&other, within).await?;
    let fresh = format!("fresh-{round}");
    let again = ["vm", "activate", &substrate, "--name", &fresh, "--site", center];
    cli.ask::<ActivateReport>(&again, within).await.context("activate another one")?;
    let held = seen_move(sites, link, (&fresh, ap), within).await?;
    cli.delete(&fresh, within).await?;
    Ok(GodwitRound { cold_boot_ms, dock, activate, there, back, held })
}

/// Moves `vm` to the site `to`, watched from outside.
async fn seen_move(
    super::Sites { cli, runs, .. }: &super::Sites,
    link: &LinkHandle,
    (vm, to): (&str, &str),
    within: Duration,
) -> anyhow::Result<SeenMove> {
    let reset = ["vm", "exec", vm, "--", WITNESS, "status", "--reset"];
    cli.run(&reset, within).await.context("ask the witness before the move")?;
    let watched = Instant::now();
    let logs = consoles(cli, runs, vm).await?;
    let logs: Vec<&Path> = logs.iter().map(PathBuf::as_path).collect();
    let prober = Prober::start(&logs).await?;
    let before = link.counters().offered_bytes();
    let report = cli.migrate(vm, to, within).await?;
    let link_bytes = link.counters().offered_bytes() - before;
    let signs = prober.stop().await?;
    let watched = watched.elapsed();
    let status = cli.run(&["vm", "exec", vm, "--", WITNESS, "status"], within).await?;
    let status: Witness = serde_json::from_slice(&status)
        .with_context(|| format!("read the witness's {:?}", String::from_utf8_lossy(&status)))?;
    ensure!(status.memory_ok, "the guest's memory is damaged by its move");
    let witness_bytes = status.share(watched, report.until_stop(), PASSES);
    Ok(SeenMove { report, signs, link_bytes, witness_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_found_alone_or_inside_an_operation() {
        let report = serde_json::json!({
            "running_ms": 38.0, "first_answer_ms": null, "warm": true, "phases": [] });
        let alone: ActivateReport = pick(report.clone()).expect("alone");
        let inside: ActivateReport =
            pick(serde_json::json!({ "id": "x", "report": report })).expect("inside");
        assert_eq!(alone, inside);
        assert!(pick::<ActivateReport>(serde_json::json!({ "id": "x" })).is_err());
    }

    #[tokio::test]
    async fn what_the_program_says_when_it_fails_is_passed_on() {
        let cli = GodwitCli { program: "ls".into(), namespace: None, env: Vec::new() };
        let failed: anyhow::Result<Value> =
            cli.ask(&["/no/such/place"], Duration::from_secs(10)).await;
        let words = failed.expect_err("ls fails").to_string();
        assert!(words.contains("/no/such/place") && words.contains("failed"), "{words}");
    }
}

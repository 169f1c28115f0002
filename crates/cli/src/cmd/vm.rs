//! `godwit vm`: execution environments.

use std::time::Duration;

use clap::{Args, Subcommand};
use godwit_cloud::controller::{CreateVm, DockVm, MigrateVm};
use godwit_cloud::registry::{EventKind, SiteRecord, SubstrateRecord, VmRecord};
use godwit_types::{ActivateReport, DockReport, Mib, MoveReport, Name, SubstrateKind, VmState};
use reqwest::Method;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{exec, screen};
use crate::args::{Change, ClientArgs, Named, memory};
use crate::client::Client;
use crate::failure::{Outcome, Result};
use crate::out::{self, Row, millis, size};
use crate::wait::{Changed, change, change_and_report, parts};
use crate::watch::{Watch, Watched, watch};

#[derive(Debug, Args)]
pub(crate) struct CommandArgs {
    #[command(flatten)]
    client_args: ClientArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Boot a new environment from an image
    Create(Create),
    /// Start a new environment from a substrate, in an instant
    Activate(Activate),
    /// List environments
    #[command(visible_alias = "ls")]
    List {
        /// Only those at this site
        #[arg(long)]
        site: Option<Name>,
        /// Keep the list up to date
        #[arg(short, long)]
        watch: bool,
    },
    /// Show one environment
    Get {
        /// Name or id
        vm: Named,
        /// Show what becomes of it until it is gone
        #[arg(short, long)]
        watch: bool,
    },
    /// Power an environment off; its disk is kept
    Stop {
        /// Name or id
        vm: Named,
        /// Cut the power instead of asking the guest
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        how: Change,
    },
    /// Start a stopped environment from its disk
    Start {
        /// Name or id
        vm: Named,
        #[command(flatten)]
        how: Change,
    },
    /// End an environment and remove its disk
    #[command(visible_alias = "rm")]
    Delete {
        /// Name or id
        vm: Named,
        #[command(flatten)]
        how: Change,
    },
    /// Turn an environment into a substrate in the pool
    Dock(Dock),
    /// Move a running environment to another site
    Migrate(Migrate),
    /// Show or use the serial console
    Console(screen::Console),
    /// Save the screen as PNG
    Screenshot(screen::Screenshot),
    /// Type text into the keyboard
    Type(screen::Type),
    /// Run a program in the guest, by its agent
    Exec(exec::Exec),
    /// Offer the display to a VNC viewer on this machine
    View(screen::View),
}

#[derive(Debug, Args)]
struct Create {
    /// The image to boot
    #[arg(long)]
    image: Name,
    /// Name of the environment; drawn when left out
    #[arg(long)]
    name: Option<Name>,
    /// Where; the center places it when left out
    #[arg(long)]
    site: Option<Name>,
    /// Memory, e.g. 512 (MiB) or 4G, if not the image's own
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    memory: Option<Mib>,
    /// vCPUs, 1 to 64, if not the image's own
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64))]
    vcpus: Option<u8>,
    /// The network that it is in; none when left out
    #[arg(long, value_name = "NETWORK")]
    network: Option<Named>,
    #[command(flatten)]
    how: Change,
}

#[derive(Debug, Args)]
struct Activate {
    /// Name or id of the substrate
    substrate: Named,
    /// Name of the environment; drawn when left out
    #[arg(long)]
    name: Option<Name>,
    /// Where; the center places it when left out
    #[arg(long)]
    site: Option<Name>,
    /// The network that it is in; none when left out
    #[arg(long, value_name = "NETWORK")]
    network: Option<Named>,
    #[command(flatten)]
    how: Change,
}

#[derive(Debug, Args)]
struct Dock {
    /// Name or id
    vm: Named,
    /// Name of the substrate; the environment's own when left out
    #[arg(long)]
    name: Option<Name>,
    /// Who may use it: public, restricted or private [default: restricted; private if its own
    /// substrate is]. For a public one the environment's host name, machine-id and SSH host keys are
    /// taken from it first
    #[arg(long, value_parser = substrate_kind, value_name = "KIND")]
    kind: Option<SubstrateKind>,
    #[command(flatten)]
    how: Change,
}

#[derive(Debug, Args)]
struct Migrate {
    /// Name or id
    vm: Named,
    /// The site it goes to; the center chooses one when left out
    #[arg(long)]
    to: Option<Name>,
    /// How it moves [default: hybrid]
    #[arg(long)]
    scheme: Option<String>,
    #[command(flatten)]
    how: Change,
}

fn substrate_kind(text: &str) -> Result<SubstrateKind, String> {
    serde_json::from_value(Value::String(text.into()))
        .map_err(|_| "it is public, restricted or private".into())
}

impl Row for VmRecord {
    const COLUMNS: &'static [&'static str] = &[
        "NAME", "STATE", "SITE", "IMAGE", "MEMORY", "AGE", "VCPUS", "ARCH", "GEN", "TENANT", "ID",
        "REASON",
    ];
    const WIDE: usize = 6;
    fn cells(&self) -> Vec<String> {
        let site = match &self.moving_to {
            Some(to) => format!("{} > {to}", self.site),
            None => self.site.to_string(),
        };
        vec![
            self.name.to_string(),
            self.state.to_string(),
            site,
            self.image.to_string(),
            self.memory.to_string(),
            out::age(self.created),
            self.vcpus.to_string(),
            self.arch.to_string(),
            self.generation.to_string(),
            self.tenant.to_string(),
            self.id.to_string(),
            self.reason.clone().unwrap_or_default(),
        ]
    }
    fn name(&self) -> String {
        out::of_tenant(&self.tenant, &self.name)
    }
}

impl Watch for VmRecord {
    const KIND: EventKind = EventKind::Vm;
    type Record = Self;
    fn of(record: Self) -> Self {
        record
    }
    fn key(&self) -> String {
        self.id.to_string()
    }
}

impl CommandArgs {
    pub(crate) async fn run(self) -> Result {
        let client = Client::open(&self.client_args.connect)?;
        let at = Site { client, client_args: self.client_args };
        match self.verb {
            Verb::Create(c) => at.create(c).await,
            Verb::Activate(c) => at.activate(c).await,
            Verb::List { site, watch: true } => {
                // A site that there is not is refused.
                if let Some(site) = &site {
                    let _: SiteRecord = at.client.get(&format!("/v1/sites/{site}")).await?;
                }
                let keep = Box::new(move |v: &VmRecord| site.as_ref().is_none_or(|s| *s == v.site));
                let what = Watched { list: "/v1/vms", only: None, keep };
                watch(&at.client_args, what).await
            }
            Verb::List { site, watch: false } => {
                let filter = site.map(|s| format!("?site={s}")).unwrap_or_default();
                let vms: Vec<VmRecord> = at.client.get(&format!("/v1/vms{filter}")).await?;
                out::list(at.client_args.output, &vms)?;
                Ok(Outcome::Done)
            }
            Verb::Get { vm, watch: true } => {
                let id = at.vm(&vm).await?.id;
                let only = Some(id.to_string());
                let what = Watched {
                    list: "/v1/vms",
                    only,
                    keep: Box::new(move |v: &VmRecord| v.id == id),
                };
                watch::<VmRecord>(&at.client_args, what).await
            }
            Verb::Get { vm, watch: false } => {
                out::one(at.client_args.output, &at.vm(&vm).await?)?;
                Ok(Outcome::Done)
            }
            Verb::Stop { vm, force, how } => at.stop(&vm, force, &how).await,
            Verb::Start { vm, how } => at.start(&vm, &how).await,
            Verb::Delete { vm, how } => {
                let path = format!("/v1/vms/{vm}", vm = vm.path());
                let words = format!("{vm}   deleted");
                at.report_change(&how, Method::DELETE, &path, vm.as_str(), &words).await
            }
            Verb::Dock(c) => at.dock(c).await,
            Verb::Migrate(c) => at.migrate(c).await,
            Verb::Console(c) => c.run(&at.client, at.client_args.output).await,
            Verb::Screenshot(c) => c.run(&at.client).await,
            Verb::Type(c) => c.run(&at.client).await,
            Verb::Exec(c) => c.run(&at.client, at.client_args.output).await,
            Verb::View(c) => c.run(&at.client).await,
        }
    }
}

struct Site {
    client: Client,
    client_args: ClientArgs,
}

impl Site {
    async fn vm(&self, vm: &Named) -> Result<VmRecord> {
        self.client.get(&format!("/v1/vms/{vm}", vm = vm.path())).await
    }

    async fn report_change(
        &self,
        how: &Change,
        method: Method,
        path: &str,
        name: &str,
        words: &str,
    ) -> Result {
        let (client, client_args) = (&self.client, &self.client_args);
        change_and_report(client, client_args, how, (method, path), &json!({}), (name, words)).await
    }

    async fn create(&self, c: Create) -> Result {
        let body = CreateVm {
            name: c.name,
            image: Some(c.image),
            site: c.site,
            memory_mib: c.memory,
            vcpus: c.vcpus,
            network: c.network.map(|n| n.to_string()),
            ..CreateVm::default()
        };
        self.made(&body, &c.how).await
    }

    async fn activate(&self, c: Activate) -> Result {
        let body = CreateVm {
            name: c.name,
            substrate: Some(c.substrate.to_string()),
            site: c.site,
            network: c.network.map(|n| n.to_string()),
            ..CreateVm::default()
        };
        self.made(&body, &c.how).await
    }

    async fn made(&self, body: &CreateVm, how: &Change) -> Result {
        let (client, client_args) = (&self.client, &self.client_args);
        let done = change(client, client_args, how, Method::POST, "/v1/vms", body).await?;
        let Changed::Done { op, target } = done else { return Ok(Outcome::Done) };
        let target = target.unwrap_or_default();
        let vm: VmRecord = client.get(&format!("/v1/vms/{target}")).await?;
        let (op, result) = parts(op);
        let report: Option<ActivateReport> = report(result.as_ref(), "activate");
        let source = match &body.substrate {
            Some(s) => format!("from substrate {s}"),
            None => format!("from image {}", vm.image),
        };
        let mut words = format!("{}   {} at {}   {source}", vm.name, vm.state, vm.site);
        if let Some(r) = &report {
            words.push_str(&format!("   vCPUs {}", millis(r.running_ms)));
            if let Some(ms) = r.first_answer_ms {
                words.push_str(&format!(", first answer {}", millis(ms)));
            }
        }
        let name = vm.name.to_string();
        out::action(client_args.output, &words, &name, &answer(op, "vm", &vm, report.as_ref()))?;
        Ok(Outcome::Done)
    }

    async fn stop(&self, name: &Named, force: bool, how: &Change) -> Result {
        let vm = self.vm(name).await?;
        let words = format!("{}   stopped", vm.name);
        if vm.state == VmState::Stopped {
            return self.unchanged(&vm, "is stopped already");
        }
        let path = format!("/v1/vms/{name}/stop?force={force}", name = name.path());
        self.report_change(how, Method::POST, &path, vm.name.as_str(), &words).await
    }

    async fn start(&self, name: &Named, how: &Change) -> Result {
        let vm = self.vm(name).await?;
        let words = format!("{}   running at {}", vm.name, vm.site);
        if vm.state == VmState::Running {
            return self.unchanged(&vm, "runs already");
        }
        let path = format!("/v1/vms/{name}/start", name = name.path());
        self.report_change(how, Method::POST, &path, vm.name.as_str(), &words).await
    }

    fn unchanged(&self, vm: &VmRecord, why: &str) -> Result {
        let words = format!("{}   {why}", vm.name);
        let data = json!({ "name": vm.name, "unchanged": true, "vm": vm });
        out::action(self.client_args.output, &words, vm.name.as_str(), &data)?;
        Ok(Outcome::Unchanged)
    }

    async fn dock(&self, c: Dock) -> Result {
        let (client, client_args) = (&self.client, &self.client_args);
        let vm = self.vm(&c.vm).await?;
        let body = DockVm { name: c.name, kind: c.kind };
        let path = format!("/v1/vms/{}/dock", c.vm.path());
        let done = change(client, client_args, &c.how, Method::POST, &path, &body).await?;
        let Changed::Done { op, .. } = done else { return Ok(Outcome::Done) };
        let (op, result) = parts(op);
        let id = result.as_ref().and_then(|r| r["substrate"].as_str()).unwrap_or_default();
        let substrate: SubstrateRecord = client.get(&format!("/v1/substrates/{id}")).await?;
        let report: Option<DockReport> = report(result.as_ref(), "dock");
        let mut words = format!("{}   docked from {}", substrate.name, vm.name);
        if let Some(r) = &report {
            words.push_str(&format!(
                "   stopped for {}, in the pool after {}   {} stored as {}",
                millis(r.pause_ms),
                millis(r.total_ms),
                size(r.raw_bytes),
                size(r.stored_bytes)
            ));
        }
        let mut data = answer(op, "substrate", &substrate, report.as_ref());
        data["vm"] = json!(vm.name);
        out::action(client_args.output, &words, substrate.name.as_str(), &data)?;
        Ok(Outcome::Done)
    }

    async fn migrate(&self, c: Migrate) -> Result {
        let (client, client_args) = (&self.client, &self.client_args);
        let before = self.vm(&c.vm).await?;
        if c.to.as_ref() == Some(&before.site) && before.state == VmState::Running {
            return self.unchanged(&before, &format!("is at {} already", before.site));
        }
        let body = MigrateVm { to: c.to, scheme: c.scheme };
        let path = format!("/v1/vms/{}/migrate", c.vm.path());
        let done = change(client, client_args, &c.how, Method::POST, &path, &body).await?;
        let Changed::Done { op, .. } = done else { return Ok(Outcome::Done) };
        let (op, result) = parts(op);
        let vm: VmRecord = client.get(&format!("/v1/vms/{}", before.id)).await?;
        let report: Option<MoveReport> = report(result.as_ref(), "move");
        let mut words = format!("{}   at {}", vm.name, vm.site);
        if let Some(r) = &report {
            words.push_str(&format!(
                "   switched after {}, down {}, independent after {}   {} moved",
                millis(r.switch_ms),
                r.downtime_text(),
                millis(r.total_ms),
                size(r.bytes.total())
            ));
        }
        let name = vm.name.to_string();
        out::action(client_args.output, &words, &name, &answer(op, "vm", &vm, report.as_ref()))?;
        Ok(Outcome::Done)
    }
}

/// The report in an operation's result; none when the center came back in between and only
/// knows that it ended well.
fn report<T: DeserializeOwned>(result: Option<&Value>, key: &str) -> Option<T> {
    result.and_then(|r| serde_json::from_value(r.get(key)?.clone()).ok())
}

fn answer<T: serde::Serialize, R: serde::Serialize>(
    op: Option<godwit_types::OpId>,
    key: &str,
    object: &T,
    report: Option<&R>,
) -> Value {
    let mut all = json!({ "op": op, key: object });
    if let Some(r) = report {
        all["report"] = json!(r);
    }
    all
}

/// Waits at most so long for a stream to be opened.
pub(super) const OPEN_WITHIN: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_taken_from_results_and_put_next_to_the_object() {
        let r = json!({ "site": "center", "activate": {
            "running_ms": 38.0, "first_answer_ms": 190.0, "warm": true, "phases": [] } });
        let found: ActivateReport = report(Some(&r), "activate").expect("a report");
        let all = answer(None, "vm", &"a", Some(&found));
        assert_eq!(all["report"]["running_ms"], 38.0);
        let none: Option<ActivateReport> = report(Some(&json!({ "activate": null })), "activate");
        assert!(none.is_none());
        assert!(answer(None, "vm", &"a", none.as_ref()).get("report").is_none());
    }

    #[test]
    fn kinds_are_words() {
        assert_eq!(substrate_kind("public"), Ok(SubstrateKind::Public));
        assert!(substrate_kind("secret").is_err());
    }
}

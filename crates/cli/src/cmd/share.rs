//! `godwit grant`, `godwit quota`: what tenants lend to each other, and how much each may have.

use clap::{Args, Subcommand};
use godwit_cloud::api::Grant;
use godwit_cloud::registry::{Quota, SubstrateRecord, TenantQuota};
use godwit_types::Name;
use reqwest::Method;
use serde_json::json;

use crate::args::{ClientArgs, Named, bytes, memory};
use crate::client::{Client, EMPTY};
use crate::failure::{Failure, Outcome, Result};
use crate::out::{self, Row};

#[derive(Debug, Args)]
pub(crate) struct Grants {
    #[command(flatten)]
    client_args: ClientArgs,
    #[command(subcommand)]
    verb: GrantVerb,
}

#[derive(Debug, Subcommand)]
enum GrantVerb {
    /// List the tenants that a substrate is granted to
    #[command(visible_alias = "ls")]
    List {
        /// The substrate: name or id
        substrate: Named,
    },
    /// Let another tenant make machines of a restricted substrate
    Create {
        /// The substrate: name or id
        substrate: Named,
        /// The tenant
        to: Name,
    },
    /// Take that back; machines that were made of it stay
    #[command(visible_alias = "rm")]
    Delete {
        /// The substrate: name or id
        substrate: Named,
        /// The tenant
        to: Name,
    },
}

/// A tenant that a substrate is granted to.
#[derive(Debug, serde::Serialize)]
struct Granted {
    substrate: String,
    tenant: Name,
}

impl Row for Granted {
    const COLUMNS: &'static [&'static str] = &["TENANT", "SUBSTRATE"];
    const WIDE: usize = 2;
    fn cells(&self) -> Vec<String> {
        vec![self.tenant.to_string(), self.substrate.clone()]
    }
    fn name(&self) -> String {
        self.tenant.to_string()
    }
}

impl Grants {
    pub(crate) async fn run(self) -> Result {
        let client = Client::open(&self.client_args.connect)?;
        let format = self.client_args.output;
        match self.verb {
            GrantVerb::List { substrate } => {
                let path = format!("/v1/substrates/{}", substrate.path());
                let s: SubstrateRecord = client.get(&path).await?;
                let name = out::of_tenant(&s.tenant, &s.name);
                let of = |tenant| Granted { substrate: name.clone(), tenant };
                let all: Vec<_> = s.granted.into_iter().map(of).collect();
                out::list(format, &all)?;
            }
            GrantVerb::Create { substrate, to } => {
                let path = format!("/v1/substrates/{}/grants", substrate.path());
                let grant = Grant { tenant: to.clone() };
                let s: SubstrateRecord = client.ask(Method::POST, &path, Some(&grant)).await?;
                let words = format!("{}   granted to {to}", s.name);
                out::action(format, &words, s.name.as_str(), &json!({ "substrate": s }))?;
            }
            GrantVerb::Delete { substrate, to } => {
                let path = format!("/v1/substrates/{}/grants/{to}", substrate.path());
                let s: SubstrateRecord = client.ask(Method::DELETE, &path, EMPTY).await?;
                let words = format!("{}   no longer granted to {to}", s.name);
                out::action(format, &words, s.name.as_str(), &json!({ "substrate": s }))?;
            }
        }
        Ok(Outcome::Done)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Quotas {
    #[command(flatten)]
    client_args: ClientArgs,
    #[command(subcommand)]
    verb: QuotaVerb,
}

#[derive(Debug, Subcommand)]
enum QuotaVerb {
    /// Show how much a tenant may have, and has
    Get {
        /// The tenant
        of: Name,
    },
    /// Change how much a tenant may have; what is not named stays, `none` is no limit
    Set {
        /// The tenant
        of: Name,
        /// Machines, running or not
        #[arg(long, value_name = "N", value_parser = number)]
        machines: Option<Limit>,
        /// vCPUs of the machines that are on
        #[arg(long, value_name = "N", value_parser = number)]
        vcpus: Option<Limit>,
        /// Memory of the machines that are on, e.g. 8G
        #[arg(long, value_name = "SIZE", value_parser = mib)]
        memory: Option<Limit>,
        /// Disks of its machines, running or not, as their guests see them, e.g. 100G
        #[arg(long, value_name = "SIZE", value_parser = size)]
        disk: Option<Limit>,
        /// Memory and disk of its substrates, each in full whatever they share, e.g. 20G
        #[arg(long, value_name = "SIZE", value_parser = size)]
        pool: Option<Limit>,
        /// Machines that move at once
        #[arg(long, value_name = "N", value_parser = number)]
        moves: Option<Limit>,
    },
}

/// A limit, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limit(Option<u64>);

fn limit(text: &str, read: impl FnOnce(&str) -> Result<u64, String>) -> Result<Limit, String> {
    match text {
        "none" => Ok(Limit(None)),
        text => read(text).map(|n| Limit(Some(n))),
    }
}

fn number(text: &str) -> Result<Limit, String> {
    limit(text, |t| t.parse().map_err(|_| format!("'{t}' is not a number; or write none")))
}

fn mib(text: &str) -> Result<Limit, String> {
    limit(text, |t| memory(t).map(|m| u64::from(m.0)))
}

fn size(text: &str) -> Result<Limit, String> {
    limit(text, bytes)
}

impl Row for TenantQuota {
    const COLUMNS: &'static [&'static str] =
        &["TENANT", "MACHINES", "VCPUS", "MEMORY", "DISK", "POOL", "MOVES"];
    const WIDE: usize = 7;
    fn cells(&self) -> Vec<String> {
        let (u, q) = (&self.used, &self.quota);
        let of = |used: String, limit: Option<String>| match limit {
            Some(limit) => format!("{used} of {limit}"),
            None => used,
        };
        let plain =
            |used: u64, limit: Option<u64>| of(used.to_string(), limit.map(|n| n.to_string()));
        let sized = |used: u64, limit: Option<u64>| of(out::size(used), limit.map(out::size));
        vec![
            self.tenant.to_string(),
            plain(u.machines, q.machines),
            plain(u.vcpus, q.vcpus),
            sized(u.memory_mib << 20, q.memory_mib.map(|m| m << 20)),
            sized(u.disk_bytes, q.disk_bytes),
            sized(u.pool_bytes, q.pool_bytes),
            plain(u.moves, q.moves),
        ]
    }
    fn name(&self) -> String {
        self.tenant.to_string()
    }
}

impl Quotas {
    pub(crate) async fn run(self) -> Result {
        let client = Client::open(&self.client_args.connect)?;
        let format = self.client_args.output;
        match self.verb {
            QuotaVerb::Get { of } => {
                let quota: TenantQuota = client.get(&format!("/v1/tenants/{of}/quota")).await?;
                out::one(format, &quota)?;
            }
            QuotaVerb::Set { of, machines, vcpus, memory, disk, pool, moves } => {
                let given = [machines, vcpus, memory, disk, pool, moves];
                if given.iter().all(Option::is_none) {
                    return Err(Failure::usage("say what to change, e.g. --machines 10"));
                }
                let path = format!("/v1/tenants/{of}/quota");
                let now: TenantQuota = client.get(&path).await?;
                let or = |new: Option<Limit>, old| new.map_or(old, |l| l.0);
                let new = Quota {
                    machines: or(machines, now.quota.machines),
                    vcpus: or(vcpus, now.quota.vcpus),
                    memory_mib: or(memory, now.quota.memory_mib),
                    disk_bytes: or(disk, now.quota.disk_bytes),
                    pool_bytes: or(pool, now.quota.pool_bytes),
                    moves: or(moves, now.quota.moves),
                };
                if new == now.quota {
                    let words = format!("{of}   has that quota already");
                    let data = json!({ "tenant": of, "unchanged": true });
                    out::action(format, &words, of.as_str(), &data)?;
                    return Ok(Outcome::Unchanged);
                }
                let set: TenantQuota = client.ask(Method::PUT, &path, Some(&new)).await?;
                out::one(format, &set)?;
            }
        }
        Ok(Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_numbers_sizes_or_none() {
        assert_eq!(number("7"), Ok(Limit(Some(7))));
        assert_eq!(mib("4G"), Ok(Limit(Some(4096))));
        assert_eq!(size("1K"), Ok(Limit(Some(1024))));
        assert_eq!(number("none"), Ok(Limit(None)));
        assert!(number("x").is_err() && mib("4X").is_err() && size("-1").is_err());
    }
}

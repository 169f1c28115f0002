//! `godwit vm publish` and `unpublish`: ports of hosts that lead to machines.

use clap::Args;
use godwit_cloud::registry::VmRecord;
use godwit_site::{HostPort, PublishedPort};
use reqwest::Method;
use serde_json::json;

use crate::args::Named;
use crate::client::Client;
use crate::failure::{Outcome, Result};
use crate::out::{self, Format};

#[derive(Debug, Args)]
pub(super) struct Publish {
    /// Name or id
    vm: Named,
    /// The port of its site's host, that of the machine, and tcp or udp, e.g. 8080:80/tcp
    port: PublishedPort,
}

#[derive(Debug, Args)]
pub(super) struct Unpublish {
    /// Name or id
    vm: Named,
    /// The port of its site's host, and tcp or udp, e.g. 8080/tcp
    port: HostPort,
}

impl Publish {
    pub(super) async fn run(self, client: &Client, format: Format) -> Result {
        let path = format!("/v1/vms/{}/ports", self.vm.path());
        let vm: VmRecord = client.ask(Method::POST, &path, Some(&self.port)).await?;
        let PublishedPort { guest, protocol, .. } = self.port;
        let (name, at, site) = (&vm.name, self.port.at(), &vm.site);
        let words = format!("{name}   {at} of {site} leads to its {guest}/{protocol}");
        out::action(format, &words, name.as_str(), &json!(vm))?;
        Ok(Outcome::Done)
    }
}

impl Unpublish {
    pub(super) async fn run(self, client: &Client, format: Format) -> Result {
        let HostPort { number, protocol } = self.port;
        let path = format!("/v1/vms/{}/ports/{protocol}/{number}", self.vm.path());
        let vm: VmRecord = client.ask(Method::DELETE, &path, None::<&()>).await?;
        let mut words = format!("{}   {} leads to it no more", vm.name, self.port);
        if vm.ports_pending {
            words.push_str(&format!(" once site '{}' can be told", vm.site));
        }
        out::action(format, &words, vm.name.as_str(), &json!(vm))?;
        Ok(Outcome::Done)
    }
}

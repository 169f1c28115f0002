//! What a site is told of the ports of its machines, and what becomes of what it was not told.

use std::sync::{Arc, Mutex};

use godwit_site::{
    ByteStream, Call, PublishedPort, SiteHost, SiteReply, SiteRequest, StreamRequest,
};
use godwit_types::{Code, Fault, Name, SiteKind, VmState};

use super::tests::*;
use crate::registry::{NetworkRecord, TenantRecord, VmRecord};

/// The center's site on paper, with ports.
struct Ported {
    paper: Arc<Paper>,
    /// What it was told, each time.
    told: Mutex<Vec<Vec<PublishedPort>>>,
    /// What it answers to that.
    refuses: Mutex<Option<Fault>>,
}

#[async_trait::async_trait]
impl SiteHost for Ported {
    fn name(&self) -> &Name {
        SiteHost::name(&*self.paper)
    }
    fn speaks(&self) -> u16 {
        self.paper.speaks()
    }
    async fn open(&self, request: StreamRequest) -> Result<ByteStream, Fault> {
        self.paper.open(request).await
    }
    async fn answer(&self, request: SiteRequest, call: Call) -> Result<SiteReply, Fault> {
        match request {
            SiteRequest::VmPublish(p) => {
                if let Some(f) = self.refuses.lock().expect("lock").clone() {
                    return Err(f);
                }
                self.told.lock().expect("lock").push(p.ports);
                Ok(SiteReply::Done(()))
            }
            request => self.paper.answer(request, call).await,
        }
    }
}

impl Ported {
    fn told(&self) -> Vec<Vec<PublishedPort>> {
        std::mem::take(&mut self.told.lock().expect("lock"))
    }

    fn refuses(&self, why: Option<Fault>) {
        *self.refuses.lock().expect("lock") = why;
    }
}

async fn ported(w: &World) -> Arc<Ported> {
    let (told, refuses) = (Mutex::default(), Mutex::default());
    let site = Arc::new(Ported { paper: w.center.clone(), told, refuses });
    w.c.attach(site.clone(), SiteKind::Center).await.expect("attached");
    site
}

/// A machine that runs in the network that each tenant has.
async fn behind_nat(w: &World, n: &str) -> VmRecord {
    let vm = running(w, n).await;
    let networks = w.c.registry().networks();
    let network: NetworkRecord = networks.get(&vm.tenant, "default").expect("there");
    let place = networks.place(&network, vm.id).expect("a place");
    let placed = w.c.registry().vm_update(vm.id, vm.generation, |v| {
        v.network = Some(place);
        Ok(())
    });
    placed.expect("placed")
}

fn port(text: &str) -> PublishedPort {
    text.parse().expect("a port")
}

fn now(w: &World, n: &str) -> (Vec<PublishedPort>, bool) {
    let vm = w.c.registry().vm(n).expect("there");
    (vm.published, vm.ports_pending)
}

#[tokio::test]
async fn what_a_site_refuses_is_not_published_and_it_is_told_so_again() {
    let w = world(Send::Works).await;
    let site = ported(&w).await;
    let host: Arc<dyn SiteHost> = site.clone();
    behind_nat(&w, "a").await;
    site.refuses(Some(Fault::conflict("in use there")));
    let web = port("8080:80/tcp");
    let refused = w.c.ports.publish(&me(), "a", web).await.expect_err("refused");
    assert_eq!((refused.code, refused.message.as_str()), (Code::Conflict, "in use there"));
    // Whether it has come to know of it is not known.
    assert_eq!(now(&w, "a"), (vec![], true));
    site.refuses(None);
    w.c.refresh(&host).await.expect("reported");
    assert_eq!((site.told(), now(&w, "a")), (vec![vec![]], (vec![], false)));
    w.c.refresh(&host).await.expect("reported");
    assert!(site.told().is_empty(), "once is enough");

    let vm = w.c.ports.publish(&me(), "a", web).await.expect("published");
    assert_eq!((vm.published, vm.ports_pending), (vec![web], false));
    assert_eq!(site.told(), [vec![web]]);
    // One that is away closes it when it is back.
    w.c.detach(&host);
    let away = w.c.ports.publish(&me(), "a", port("8081:81/tcp")).await.expect_err("away");
    assert_eq!(away.code, Code::Unavailable);
    let vm = w.c.ports.unpublish(&me(), "a", web.at()).await.expect("taken out");
    assert!(vm.ports_pending && vm.published.is_empty());
    w.c.attach(host.clone(), SiteKind::Center).await.expect("back");
    w.c.refresh(&host).await.expect("reported");
    assert_eq!((site.told(), now(&w, "a")), (vec![vec![]], (vec![], false)));
}

#[tokio::test]
async fn a_port_is_one_machines_in_the_whole_cloud() {
    let w = world(Send::Works).await;
    let site = ported(&w).await;
    let a = behind_nat(&w, "a").await;
    let b = behind_nat(&w, "b").await;
    let (tcp, udp) = (port("8080:80/tcp"), port("8080:80/udp"));
    for p in [tcp, udp] {
        let _ = w.c.ports.publish(&me(), "a", p).await.expect("published");
    }
    assert_eq!(site.told(), [vec![tcp], vec![tcp, udp]]);
    let refused = w.c.ports.publish(&me(), "b", port("8080:81/tcp")).await.expect_err("taken");
    assert_eq!(refused.message, "port 8080/tcp is published already, by machine 'a'");
    // What others have is not told by name.
    let reg = w.c.registry();
    reg.people().tenant_add(&me(), &TenantRecord::new(name("acme"))).expect("tenant");
    let theirs = VmRecord {
        id: godwit_types::VmId::new(),
        tenant: name("acme"),
        name: name("theirs"),
        network: None,
        ..b.clone()
    };
    let network = reg.networks().get(&name("acme"), "default").expect("there");
    let place = reg.networks().place(&network, theirs.id).expect("a place");
    reg.vm_add(&VmRecord { network: Some(place), ..theirs.clone() }, None).expect("added");
    let foreign = reg.ports().publish(&me(), theirs.id, tcp).expect_err("taken");
    assert_eq!(
        foreign.to_string(),
        "port 8080/tcp is published already, by a machine of another tenant"
    );
    // In the midst of a move its ports are about to be another site's.
    let moving = reg.vm_update(a.id, a.generation, |v| {
        Ok(v.become_state(VmState::Moving, godwit_types::UnixMs::now())?)
    });
    moving.expect("moving");
    let busy = w.c.ports.publish(&me(), "a", port("8081:80/tcp")).await.expect_err("it moves");
    assert_eq!(busy.message, "machine 'a' is moving");
    let busy = w.c.ports.unpublish(&me(), "a", tcp.at()).await.expect_err("it moves");
    assert_eq!(busy.code, Code::Conflict);
    assert!(busy.hint.is_some_and(|h| h.contains("godwit ")));
    // Who did what is in the log.
    let noted = reg.audit().entries(10, 0, |e| e.action == "vm publish").expect("read");
    let noted: Vec<_> = noted.iter().map(|e| e.object.as_str()).collect();
    assert_eq!(noted, ["a 8080:80/tcp", "a 8080:80/udp"]);
}

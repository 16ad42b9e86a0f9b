//! Addresses of gateway nodes that are dialled by name: a load balancer that has only a host name, or a dynamic DNS name.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use raven_api::prefix::is_routable;
use tokio::{
    net::lookup_host,
    sync::watch,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    observe::Latest,
    topology::{Inputs, host_names},
};

/// Pause between two lookups of all names. Names change without notice.
const PERIOD: Duration = Duration::from_secs(20);
/// Time limit of a lookup.
const LIMIT: Duration = Duration::from_secs(10);

/// Keeps the addresses in the inputs up to date, until the process ends. Where a lookup fails, the last address stays.
/// `latest`: the agent's last run, which shows whether a gateway node answers.
pub async fn run(inputs: watch::Sender<Option<Arc<Inputs>>>, me: String, latest: watch::Receiver<Latest>) {
    let mut changes = inputs.subscribe();
    let mut failing = BTreeSet::new();
    loop {
        let (wanted, known) = match &*changes.borrow_and_update() {
            Some(inputs) => (host_names(inputs, &me), inputs.resolved.clone()),
            None => Default::default(),
        };
        let mut resolved = BTreeMap::new();
        let last_run = latest.borrow().clone();
        let without_session = without_session(last_run).await;
        for (name, nodes) in &wanted {
            let last = known.get(name).copied();
            let found = lookup(name).await;
            match &found {
                Ok(_) => _ = failing.remove(name),
                Err(error) if failing.insert(name.clone()) => {
                    tracing::warn!(
                        name,
                        error,
                        "cannot resolve the name of a gateway node; an address that it had before stays in use"
                    );
                }
                Err(_) => {}
            }
            let current = Current { address: last, has_session: !nodes.is_subset(&without_session) };
            let address = found.ok().and_then(|found| choose(current, found, has_route)).or(last);
            resolved.extend(address.map(|address| (name.clone(), address)));
        }
        inputs.send_if_modified(|inputs| match inputs {
            Some(inputs) if inputs.resolved != resolved => {
                Arc::make_mut(inputs).resolved = resolved;
                true
            }
            _ => false,
        });
        let due = Instant::now() + PERIOD;
        loop {
            tokio::select! {
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    if changes.borrow().as_ref().is_some_and(|inputs| host_names(inputs, &me) != wanted) {
                        break;
                    }
                }
                () = sleep_until(due), if !wanted.is_empty() => break,
            }
        }
    }
}

/// The addresses of a name by the system's resolver.
async fn lookup(name: &str) -> Result<BTreeSet<IpAddr>, String> {
    match timeout(LIMIT, lookup_host((name, 0))).await {
        Ok(Ok(found)) => {
            let addresses = found.map(|address: SocketAddr| address.ip().to_canonical());
            Ok(addresses.filter(|ip| is_routable(&IpNet::from(*ip))).collect())
        }
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err(format!("no answer within {} s", LIMIT.as_secs())),
    }
}

/// Gateway nodes of other pools whose peer has a keepalive and no live session. Without a keepalive, a peer has no session
/// while it is idle.
async fn without_session(latest: Latest) -> BTreeSet<String> {
    let Some((report, Some(tunnel))) = latest else { return BTreeSet::new() };
    let peers = tunnel.peers().await.unwrap_or_default();
    let silent = peers.iter().filter(|(_, peer)| peer.keepalive.is_some() && !peer.alive).map(|(key, _)| key);
    silent.filter_map(|key| report.plan.peer_names.get(key)).map(|name| name.node.clone()).collect()
}

/// The address that is dialled now.
#[derive(Clone, Copy, Default)]
struct Current {
    address: Option<IpAddr>,
    /// A gateway node answers there.
    has_session: bool,
}

/// The address to dial: the current one while the name has it and a gateway node answers there, else the next one to which
/// this node has a route. At first it is the lowest, and IPv4 before IPv6.
fn choose(current: Current, found: BTreeSet<IpAddr>, has_route: impl Fn(&IpAddr) -> bool) -> Option<IpAddr> {
    let address = current.address.filter(|address| found.contains(address));
    if address.is_some() && current.has_session {
        return address;
    }
    let routed: BTreeSet<IpAddr> = found.iter().copied().filter(has_route).collect();
    // The default route may be missing for a moment.
    let usable = if routed.is_empty() { found } else { routed };
    let next = address.and_then(|current| usable.range(current..).find(|address| **address != current));
    next.or(usable.first()).copied()
}

/// True if the kernel has a route to the address. Connecting a UDP socket sends no packet.
fn has_route(address: &IpAddr) -> bool {
    let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // The port does not matter.
    UdpSocket::bind((any, 0)).and_then(|socket| socket.connect((*address, 9))).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_kept_while_it_answers_and_the_next_one_is_tried_otherwise() {
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        let chosen = |current: &str, has_session, found: &[&str], routed: fn(&IpAddr) -> bool| {
            let current = Current { address: current.parse().ok(), has_session };
            choose(current, found.iter().map(|text| address(text)).collect(), routed)
        };
        let all = |_: &IpAddr| true;
        let two = ["192.0.2.1", "192.0.2.2"];
        assert_eq!(chosen("192.0.2.2", true, &two, all), Some(address("192.0.2.2")));
        assert_eq!(chosen("192.0.2.1", false, &two, all), Some(address("192.0.2.2")));
        assert_eq!(chosen("192.0.2.2", false, &two, all), Some(address("192.0.2.1")), "the first one again");
        assert_eq!(chosen("192.0.2.1", false, &two[..1], all), Some(address("192.0.2.1")), "the only one");
        assert_eq!(chosen("192.0.2.2", false, &["2001:db8::1", "192.0.2.3"], all), Some(address("192.0.2.3")));
        assert_eq!(chosen("", true, &["2001:db8::1", "192.0.2.3"], IpAddr::is_ipv6), Some(address("2001:db8::1")));
        assert_eq!(
            chosen("", true, &["2001:db8::1"], IpAddr::is_ipv4),
            Some(address("2001:db8::1")),
            "no route at all"
        );
        assert_eq!(
            chosen("192.0.2.2", true, &["192.0.2.2", "2001:db8::1"], IpAddr::is_ipv6),
            Some(address("192.0.2.2")),
            "its route may return"
        );
        assert_eq!(chosen("192.0.2.2", true, &[], all), None);
    }
}

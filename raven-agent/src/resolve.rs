//! Addresses of gateway nodes that are dialled by name: a load balancer that has only a host name, or a dynamic DNS name.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
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

use crate::topology::{Inputs, host_names};

/// Pause between two lookups of all names. Names change without notice.
const PERIOD: Duration = Duration::from_secs(20);
/// Time limit of a lookup.
const LIMIT: Duration = Duration::from_secs(10);

/// Keeps the addresses in the inputs up to date, until the process ends. Where a lookup fails, the last address stays.
pub async fn run(inputs: watch::Sender<Option<Arc<Inputs>>>, me: String) {
    let mut changes = inputs.subscribe();
    let mut failing = BTreeSet::new();
    loop {
        let (wanted, known) = match &*changes.borrow_and_update() {
            Some(inputs) => (host_names(inputs, &me), inputs.resolved.clone()),
            None => Default::default(),
        };
        let mut resolved = BTreeMap::new();
        for name in &wanted {
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
            let address = found.ok().and_then(|found| choose(last, found)).or(last);
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

/// The address to dial: the present one if it is among those found. Otherwise IPv4 comes first, because some sites have
/// no IPv6.
fn choose(present: Option<IpAddr>, found: BTreeSet<IpAddr>) -> Option<IpAddr> {
    present.filter(|address| found.contains(address)).or_else(|| found.into_iter().min())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn present_address_stays_while_the_name_has_it() {
        let addresses = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("an address")).collect();
        let present: Option<IpAddr> = "192.0.2.2".parse().ok();
        assert_eq!(choose(present, addresses(&["192.0.2.1", "192.0.2.2"])), present);
        assert_eq!(choose(present, addresses(&["2001:db8::1", "192.0.2.3"])), "192.0.2.3".parse().ok());
        assert_eq!(choose(present, addresses(&[])), None);
    }
}

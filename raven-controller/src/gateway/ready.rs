//! Which cloud proxies count as ready. Agents and the Service use only those.

use std::collections::{BTreeMap, BTreeSet};

use raven_api::condition::ConditionType;
use raven_api::gateway::{EndpointType, Gateway, GatewayStatus};
use raven_api::gateway_node::ProxyStatus;

/// Returns the elected nodes of exposed Gateways whose proxy is ready.
///
/// A node counts as ready if its own GatewayNode reports so and enough edges report a connection to it. The second
/// condition detects agents that died and left a stale status. Only elected proxy nodes of edge Gateways with condition
/// Elected True count: the status of a site without power is stale, too. "Enough" is at least half as many edges as the
/// best-connected cloud node has. Each edge counts once per cloud node, and only for elected cloud nodes: an edge node
/// may be stolen and report anything.
///
/// Idle edges notice a failure only after their keepalive interval. A cloud node that most of the other proxies of its Gateway
/// cannot reach any more is therefore not ready. Two that report each other have an interrupted link between them, which
/// says nothing about either. Without any other, a node stays.
pub(crate) fn ready<'a>(
    gateways: impl Iterator<Item = &'a Gateway> + Clone,
    proxies: impl Iterator<Item = (&'a str, &'a ProxyStatus)>,
) -> BTreeSet<&'a str> {
    let elected = |exposed: bool| {
        let of_kind = gateways.clone().filter(move |g| g.is_exposed() == exposed);
        let status = of_kind
            .filter_map(|g| Some((g.metadata.name.as_deref()?, g.status.as_ref()?)))
            .filter(move |(_, s)| exposed || condition_holds(s, ConditionType::Elected));
        status.flat_map(|(gateway, s)| {
            let proxies = s.active_endpoints.iter().filter(|e| e.type_ == EndpointType::Proxy);
            proxies.map(move |e| (e.node_name.as_str(), gateway))
        })
    };
    let clouds: BTreeMap<&str, &str> = elected(true).collect();
    let edges: BTreeSet<&str> = elected(false).map(|(name, _)| name).collect();
    let proxies: Vec<_> = proxies.filter(|(_, proxy)| proxy.ready).collect();
    let mut edges_connected: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, edge) in proxies.iter().filter(|(name, _)| edges.contains(name)) {
        let named: BTreeSet<&str> =
            edge.tunnels.iter().map(String::as_str).filter(|name| clouds.contains_key(name)).collect();
        named.into_iter().for_each(|cloud| *edges_connected.entry(cloud).or_default() += 1);
    }
    let most = edges_connected.values().copied().max().unwrap_or(0);
    let connected = |name: &str| most == 0 || edges_connected.get(name).copied().unwrap_or(0) * 2 >= most;
    let mut working: BTreeMap<&str, BTreeMap<&str, &ProxyStatus>> = BTreeMap::new();
    for (name, status) in proxies.iter().filter(|(name, _)| connected(name)) {
        if let Some(gateway) = clouds.get(name) {
            working.entry(gateway).or_default().insert(name, status);
        }
    }
    working.values().flat_map(reached).collect()
}

/// The proxies of one Gateway without those that most of the others cannot reach; all, if that leaves none.
fn reached<'a>(proxies: &BTreeMap<&'a str, &'a ProxyStatus>) -> BTreeSet<&'a str> {
    let misses = |status: &ProxyStatus, name: &str| status.unreachable.iter().any(|lost| lost == name);
    let is_reached = |name: &str, own: &ProxyStatus| {
        let reports = proxies.iter().filter(|(other, status)| misses(status, name) && !misses(own, other)).count();
        reports * 2 < proxies.len()
    };
    let reached: BTreeSet<&str> =
        proxies.iter().filter(|(name, own)| is_reached(name, own)).map(|(name, _)| *name).collect();
    if reached.is_empty() { proxies.keys().copied().collect() } else { reached }
}

fn condition_holds(status: &GatewayStatus, type_: ConditionType) -> bool {
    status.conditions.iter().any(|c| c.type_ == type_.as_str() && c.status == "True")
}

#[cfg(test)]
mod tests {
    use raven_api::gateway::{Endpoint, ExposeType, GatewaySpec};

    use super::*;

    fn site(name: &str, expose_type: ExposeType, nodes: &[&str], elected: &str) -> Gateway {
        let mut gateway = Gateway::new(name, GatewaySpec { expose_type, ..GatewaySpec::default() });
        let endpoint =
            |node: &&str| Endpoint { node_name: (*node).to_owned(), type_: EndpointType::Proxy, ..Endpoint::default() };
        let condition = serde_json::json!({ "type": "Elected", "status": elected, "reason": "x", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z" });
        let conditions = vec![serde_json::from_value(condition).expect("a condition")];
        let active_endpoints = nodes.iter().map(endpoint).collect();
        gateway.status = Some(GatewayStatus { active_endpoints, conditions, ..GatewayStatus::default() });
        gateway
    }

    fn cloud() -> Gateway {
        site("cloud", ExposeType::PublicIP, &["a", "b"], "True")
    }

    fn edge(name: &str, elected: &str) -> Gateway {
        site(name, ExposeType::Edge, &[&format!("{name}1")], elected)
    }

    /// The ready proxies; each of `edges` reports connections to these nodes.
    fn ready_with(gateways: &[Gateway], edges: &[(&str, Vec<String>)]) -> Vec<String> {
        ready_of(gateways, &[("a", &[]), ("b", &[])], edges)
    }

    /// The same; each of `clouds` reports that it cannot reach these nodes.
    fn ready_of(gateways: &[Gateway], clouds: &[(&str, &[&str])], edges: &[(&str, Vec<String>)]) -> Vec<String> {
        let clouds = clouds.iter().map(|(name, unreachable)| {
            (*name, ProxyStatus { ready: true, unreachable: names(unreachable), ..ProxyStatus::default() })
        });
        let edges = edges.iter().map(|(name, tunnels)| {
            (*name, ProxyStatus { ready: true, tunnels: tunnels.clone(), ..ProxyStatus::default() })
        });
        let all: Vec<_> = clouds.into_iter().chain(edges).collect();
        let proxies = all.iter().map(|(name, proxy)| (*name, proxy));
        ready(gateways.iter(), proxies).into_iter().map(str::to_owned).collect()
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn an_edge_counts_once_per_cloud_node_and_only_for_cloud_nodes() {
        let gateways = [cloud(), edge("x", "True"), edge("y", "True")];
        let with_stolen = |stolen: Vec<String>| ready_with(&gateways, &[("x1", names(&["a", "b"])), ("y1", stolen)]);
        assert_eq!(with_stolen(vec!["ghost".to_owned(); 10_000]), ["a", "b"]);
        assert_eq!(with_stolen(vec!["a".to_owned(); 10_000]), ["a", "b"]);
        assert_eq!(with_stolen((0..10_000).map(|n| format!("ghost-{n}")).collect()), ["a", "b"]);
    }

    #[test]
    fn proxy_without_connected_edges_is_not_ready() {
        let mut gateways = vec![cloud(), edge("x", "True"), edge("y", "False")];
        // Site `y` has no power; its stale status lists connections to both nodes.
        let reports = [("x1", names(&["b"])), ("y1", names(&["a", "b"]))];
        assert_eq!(ready_with(&gateways, &reports), ["b"]);
        assert_eq!(ready_with(&gateways[..1], &reports), ["a", "b"], "without any edge, the own reports suffice");
        gateways.extend([edge("v", "True"), edge("w", "True")]);
        let reports = [("x1", names(&["b"])), ("v1", names(&["a", "b"])), ("w1", names(&["b"]))];
        assert_eq!(ready_with(&gateways, &reports), ["b"], "one edge of three is connected to `a`");
        let reports = [("x1", names(&["a", "b"])), ("v1", names(&["a", "b"])), ("w1", names(&["b"]))];
        assert_eq!(ready_with(&gateways, &reports), ["a", "b"]);
    }

    #[test]
    fn proxy_that_another_one_cannot_reach_is_not_ready() {
        let gateways = [site("cloud", ExposeType::PublicIP, &["a", "b", "c"], "True"), edge("x", "True")];
        let idle = [("x1", names(&["a", "b", "c"]))];
        let ready = |clouds: &[(&str, &[&str])]| ready_of(&gateways, clouds, &idle);
        assert_eq!(ready(&[("a", &[]), ("b", &["a"]), ("c", &["a"])]), ["b", "c"]);
        assert_eq!(ready(&[("a", &[]), ("b", &["a"])]), ["b"], "of two, one decides");
        assert_eq!(ready(&[("a", &["b"]), ("b", &["a"]), ("c", &[])]), ["a", "b", "c"], "their link is interrupted");
        assert_eq!(ready(&[("a", &["b", "c"]), ("b", &["a"]), ("c", &["a"])]), ["a", "b", "c"]);
        assert_eq!(ready(&[("a", &["b", "c"]), ("b", &[]), ("c", &[])]), ["a", "b", "c"], "only `a` reaches none");
        assert_eq!(ready(&[("a", &["b", "c"]), ("b", &["a", "c"]), ("c", &[])]), ["a", "b"]);
        // The edges are connected to `b` only, so the report of `a` does not count.
        let cut_off = [("x1", names(&["b"]))];
        assert_eq!(ready_of(&gateways, &[("a", &["b"]), ("b", &[])], &cut_off), ["b"]);
        // A node of another exposed Gateway may be stolen.
        let others =
            [site("cloud", ExposeType::PublicIP, &["a"], "True"), site("x", ExposeType::PublicIP, &["b"], "True")];
        assert_eq!(ready_of(&others, &[("a", &[]), ("b", &["a"])], &[]), ["a", "b"]);
        // An edge cannot report cloud nodes.
        let mut stolen = ProxyStatus { ready: true, tunnels: names(&["a", "b"]), ..ProxyStatus::default() };
        stolen.unreachable = names(&["a"]);
        let works = ProxyStatus { ready: true, ..ProxyStatus::default() };
        let reports = [("a", &works), ("b", &works), ("x1", &stolen)];
        assert_eq!(super::ready(gateways.iter(), reports.into_iter()).into_iter().collect::<Vec<_>>(), ["a", "b"]);
    }
}

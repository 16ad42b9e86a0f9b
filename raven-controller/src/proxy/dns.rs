//! The hosts file for CoreDNS: names of edge nodes resolve to the internal Service, names of cloud nodes to the
//! nodes, as do those of pools whose proxy is off. No I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    net::IpAddr,
};

use raven_api::Gateway;

use crate::gateway::facts::NodeFacts;

/// Names per line. All edge names have the Service's addresses: at 10,000 nodes, a line for each would not fit into the
/// ConfigMap (1 MiB). CoreDNS reads lines of up to 64 KiB; a name has at most 253 characters.
const NAMES: usize = 64;

/// Returns the hosts file: lines `IP<TAB>name name…`, sorted by address. `service` contains the addresses of the internal
/// Service. It is empty while L7 is off or the Service has no address; every name then resolves to its node.
pub(crate) fn hosts<'a>(
    nodes: impl IntoIterator<Item = &'a NodeFacts>,
    gateways: &[Gateway],
    service: &[IpAddr],
) -> String {
    let edge: BTreeSet<&str> = gateways
        .iter()
        .filter(|g| !g.is_exposed() && g.proxy_replicas() > 0)
        .flat_map(|g| g.status.iter().flat_map(|s| &s.nodes))
        .map(|node| node.node_name.as_str())
        .collect();
    let mut names: BTreeMap<IpAddr, BTreeSet<&str>> = BTreeMap::new();
    for node in nodes {
        let name = node.name.as_str();
        let own: Vec<IpAddr> = node.addresses().collect();
        let addresses = if edge.contains(name) && !service.is_empty() { service } else { &own };
        for ip in addresses {
            names.entry(*ip).or_default().insert(name);
        }
    }
    let mut file = String::new();
    for (ip, names) in names {
        for line in names.into_iter().collect::<Vec<_>>().chunks(NAMES) {
            let _ = writeln!(file, "{ip}\t{}", line.join(" "));
        }
    }
    file
}

#[cfg(test)]
mod tests {
    use raven_api::{
        GatewaySpec, GatewayStatus,
        gateway::{ExposeType, NodeInfo, ProxyConfig},
    };
    use serde_json::json;

    use super::*;

    fn node(name: &str, address: &str) -> NodeFacts {
        let node =
            json!({"metadata": {"name": name}, "status": {"addresses": [{"type": "InternalIP", "address": address}]}});
        NodeFacts::parse(&serde_json::from_value(node).expect("a Node")).expect("it has a name")
    }

    fn gateway(name: &str, expose_type: ExposeType, node: &str) -> Gateway {
        let mut gateway = Gateway::new(name, GatewaySpec { expose_type, ..GatewaySpec::default() });
        let info = NodeInfo { node_name: node.to_owned(), ..NodeInfo::default() };
        gateway.status = Some(GatewayStatus { nodes: vec![info], ..GatewayStatus::default() });
        gateway
    }

    #[test]
    fn edge_names_resolve_to_the_service_and_cloud_names_to_the_nodes() {
        let nodes = [node("x-a", "10.1.0.11"), node("cloud-a", "10.0.0.11"), node("stray", "10.9.0.1")];
        let gateways = [gateway("cloud", ExposeType::PublicIP, "cloud-a"), gateway("edge-x", ExposeType::Edge, "x-a")];
        let service = ["10.96.0.7".parse().expect("an address")];
        assert_eq!(hosts(&nodes, &gateways, &service), "10.0.0.11\tcloud-a\n10.9.0.1\tstray\n10.96.0.7\tx-a\n");
        let to_nodes = "10.0.0.11\tcloud-a\n10.1.0.11\tx-a\n10.9.0.1\tstray\n";
        assert_eq!(hosts(&nodes, &gateways, &[]), to_nodes);
        let mut off = gateways;
        off[1].spec.proxy_config = Some(ProxyConfig { replicas: 0, ..ProxyConfig::default() });
        assert_eq!(hosts(&nodes, &off, &service), to_nodes, "the proxy of that pool is off");
    }

    #[test]
    fn names_of_ten_thousand_edge_nodes_fit_into_the_config_map() {
        let names: Vec<String> = (0..10_000).map(|n| format!("edge-{n:05}.site.example")).collect();
        let nodes: Vec<NodeFacts> = names.iter().map(|name| node(name, "10.1.0.11")).collect();
        let mut gateway = gateway("edge", ExposeType::Edge, "none");
        let info = |name: &String| NodeInfo { node_name: name.clone(), ..NodeInfo::default() };
        gateway.status = Some(GatewayStatus { nodes: names.iter().map(info).collect(), ..GatewayStatus::default() });
        let service = ["10.96.0.7", "fd00::7"].map(|text| text.parse().expect("an address"));
        let file = hosts(&nodes, &[gateway], &service);
        assert!(file.len() < 600_000, "{} bytes", file.len());
        assert!(file.lines().all(|line| line.len() < 64 << 10));
        let listed: BTreeSet<&str> =
            file.lines().filter_map(|line| line.strip_prefix("fd00::7\t")).flat_map(|l| l.split(' ')).collect();
        assert_eq!(listed, names.iter().map(String::as_str).collect());
    }
}

//! Services and EndpointSlices in front of gateway nodes, as JSON for server-side apply. No I/O.
//!
//! The internal Service has no selector; it has one EndpointSlice per cloud gateway node whose proxy is ready. A
//! Gateway that is exposed by load balancers gets one Service per elected node.

use std::collections::{BTreeMap, BTreeSet};

use raven_api::{
    Gateway,
    gateway::{Endpoint, EndpointType, ExposeType},
    names::{LABEL_GATEWAY, LABEL_MANAGED_BY, MANAGER_CONTROLLER},
    proxy::{
        INTERNAL_INSECURE_PORT, INTERNAL_SERVICE, LABEL_DISCARD, LABEL_ENDPOINTS_NAME, LABEL_GATEWAY_TYPE,
        LOAD_BALANCER_PREFIX, Ports, TUNNEL_LOAD_BALANCER_PREFIX, secure_listener,
    },
};
use serde_json::{Value, json};

use crate::gateway::facts::NodeName;

/// Objects in front of gateway nodes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Objects {
    /// Services to apply, by name.
    pub(crate) services: BTreeMap<String, Value>,
    /// EndpointSlices to apply, by name.
    pub(crate) slices: BTreeMap<String, Value>,
}

/// Returns the desired objects. `ready`: nodes whose proxy works; `l7`: the state of the L7 switch.
pub(crate) fn desired(namespace: &str, gateways: &[Gateway], ready: &BTreeSet<NodeName>, l7: bool) -> Objects {
    let mut objects = Objects::default();
    let exposed = || gateways.iter().filter(|g| g.is_exposed());
    if l7 {
        let ports = Ports::of(gateways);
        objects.services.insert(INTERNAL_SERVICE.to_owned(), internal_service(namespace, &ports));
        for (node, address) in exposed()
            .flat_map(|g| elected(g, EndpointType::Proxy))
            .filter(|(e, _)| ready.contains(&NodeName::from(e.node_name.as_str())))
        {
            let name = slice_name(&format!("{INTERNAL_SERVICE}-{}", node.node_name), &address);
            objects.slices.insert(
                name.clone(),
                slice(namespace, &name, INTERNAL_SERVICE, node, &address, internal_ports(&ports)),
            );
        }
    }
    for gateway in exposed().filter(|g| g.spec.expose_type == ExposeType::LoadBalancer) {
        for (type_, prefix) in
            [(EndpointType::Proxy, LOAD_BALANCER_PREFIX), (EndpointType::Tunnel, TUNNEL_LOAD_BALANCER_PREFIX)]
        {
            for (endpoint, address) in elected(gateway, type_).filter(|_| l7 || type_ == EndpointType::Tunnel) {
                add_load_balancer(namespace, gateway, endpoint, &address, prefix, &mut objects);
            }
        }
    }
    objects
}

/// Returns the elected endpoints of a Gateway that have an address, with the address.
fn elected(gateway: &Gateway, type_: EndpointType) -> impl Iterator<Item = (&Endpoint, String)> {
    let status = gateway.status.as_ref();
    let endpoints = status.into_iter().flat_map(|s| &s.active_endpoints).filter(move |e| e.type_ == type_);
    endpoints.filter_map(move |endpoint| {
        let node = status?.nodes.iter().find(|n| n.node_name == endpoint.node_name)?;
        (!node.private_ip.is_empty()).then(|| (endpoint, node.private_ip.clone()))
    })
}

fn internal_service(namespace: &str, ports: &Ports) -> Value {
    let https = ports
        .https
        .iter()
        .map(|port| json!({ "name": format!("https-{port}"), "port": port, "targetPort": secure_listener(*port), "protocol": "TCP" }));
    let http = ports
        .http
        .iter()
        .map(|port| json!({ "name": format!("http-{port}"), "port": port, "targetPort": INTERNAL_INSECURE_PORT, "protocol": "TCP" }));
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": INTERNAL_SERVICE, "namespace": namespace, "labels": { LABEL_MANAGED_BY: MANAGER_CONTROLLER, LABEL_DISCARD: "true" } },
        "spec": { "type": "ClusterIP", "ports": http.chain(https).collect::<Vec<_>>() },
    })
}

fn internal_ports(ports: &Ports) -> Vec<Value> {
    let https = ports
        .https
        .iter()
        .map(|port| json!({ "name": format!("https-{port}"), "port": secure_listener(*port), "protocol": "TCP" }));
    let http = ports
        .http
        .iter()
        .map(|port| json!({ "name": format!("http-{port}"), "port": INTERNAL_INSECURE_PORT, "protocol": "TCP" }));
    http.chain(https).collect()
}

/// The name of a slice of one family, because a slice cannot change its family.
fn slice_name(name: &str, address: &str) -> String {
    if is_ipv6(address) { format!("{name}-ipv6") } else { name.to_owned() }
}

fn is_ipv6(address: &str) -> bool {
    address.contains(':')
}

fn slice(namespace: &str, name: &str, service: &str, node: &Endpoint, address: &str, ports: Vec<Value>) -> Value {
    let family = if is_ipv6(address) { "IPv6" } else { "IPv4" };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": { "name": name, "namespace": namespace, "labels": {
            "kubernetes.io/service-name": service,
            "endpointslice.kubernetes.io/managed-by": MANAGER_CONTROLLER,
            LABEL_MANAGED_BY: MANAGER_CONTROLLER,
            LABEL_ENDPOINTS_NAME: node.node_name,
        } },
        "addressType": family,
        "endpoints": [{ "addresses": [address], "conditions": { "ready": true }, "nodeName": node.node_name }],
        "ports": ports,
    })
}

/// Adds the Service of type LoadBalancer for an elected node, and its EndpointSlice.
fn add_load_balancer(
    namespace: &str,
    gateway: &Gateway,
    endpoint: &Endpoint,
    address: &str,
    prefix: &str,
    objects: &mut Objects,
) {
    let owner = gateway.metadata.name.as_deref().unwrap_or_default();
    let name = load_balancer_name(prefix, owner, &endpoint.node_name);
    let (type_, protocol) = match endpoint.type_ {
        EndpointType::Proxy => ("proxy", "TCP"),
        EndpointType::Tunnel => ("tunnel", "UDP"),
    };
    let port = endpoint.port_or_default();
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name, "namespace": namespace, "labels": {
            LABEL_MANAGED_BY: MANAGER_CONTROLLER, LABEL_GATEWAY: owner, LABEL_GATEWAY_TYPE: type_, LABEL_ENDPOINTS_NAME: endpoint.node_name,
        } },
        "spec": {
            "type": "LoadBalancer", "externalTrafficPolicy": "Local",
            "ports": [{ "name": type_, "port": port, "targetPort": port, "protocol": protocol }],
        },
    });
    let ports = vec![json!({ "name": type_, "port": port, "protocol": protocol })];
    let slice_name = slice_name(&name, address);
    objects.slices.insert(slice_name.clone(), slice(namespace, &slice_name, &name, endpoint, address, ports));
    objects.services.insert(name, service);
}

/// Returns `<prefix>-<gateway>-<8 hex>`. The hash is computed from the node's name, so a node keeps its load balancer.
/// The name has at most 63 characters, the limit of Service names.
pub(crate) fn load_balancer_name(prefix: &str, gateway: &str, node: &str) -> String {
    // FNV-1a: short, and stable across versions.
    let hash = node.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let room = 63 - prefix.len() - 10;
    let gateway: String = gateway.chars().map(|c| if c == '.' { '-' } else { c }).take(room).collect();
    format!("{prefix}-{gateway}-{hash:08x}")
}

#[cfg(test)]
mod tests {
    use raven_api::{
        GatewaySpec, GatewayStatus,
        gateway::{NodeInfo, ProxyConfig},
    };

    use super::*;

    fn gateway(expose_type: ExposeType) -> Gateway {
        let proxy_config = Some(ProxyConfig {
            replicas: 2,
            proxy_http_port: Some("9100".to_owned()),
            proxy_https_port: Some("9443".to_owned()),
        });
        let mut gateway = Gateway::new("cloud", GatewaySpec { expose_type, proxy_config, ..GatewaySpec::default() });
        let info = |name: &str, ip: &str| NodeInfo {
            node_name: name.to_owned(),
            private_ip: ip.to_owned(),
            ..NodeInfo::default()
        };
        let endpoint = |name: &str, type_| Endpoint { node_name: name.to_owned(), type_, ..Endpoint::default() };
        gateway.status = Some(GatewayStatus {
            nodes: vec![info("a", "10.0.0.1"), info("b", "10.0.0.2")],
            active_endpoints: vec![
                endpoint("a", EndpointType::Tunnel),
                endpoint("a", EndpointType::Proxy),
                endpoint("b", EndpointType::Proxy),
            ],
            ..GatewayStatus::default()
        });
        gateway
    }

    #[test]
    fn only_ready_proxies_are_behind_the_service() {
        let gateways = [gateway(ExposeType::PublicIP)];
        let objects = desired("kube-system", &gateways, &BTreeSet::from(["a".into()]), true);
        assert_eq!(objects.slices.keys().collect::<Vec<_>>(), ["x-raven-proxy-internal-svc-a"]);
        let slice = &objects.slices["x-raven-proxy-internal-svc-a"];
        assert_eq!(slice["endpoints"][0]["addresses"], json!(["10.0.0.1"]));
        assert_eq!(slice["metadata"]["labels"]["kubernetes.io/service-name"], INTERNAL_SERVICE);
        let ports: Vec<(&str, u64)> = slice["ports"]
            .as_array()
            .expect("ports")
            .iter()
            .map(|p| (p["name"].as_str().expect("a name"), p["port"].as_u64().expect("a port")))
            .collect();
        assert_eq!(ports, [("http-9100", 10264), ("http-10255", 10264), ("https-9443", 29443), ("https-10250", 10263)]);
        let service = &objects.services[INTERNAL_SERVICE];
        assert!(service["spec"].get("selector").is_none());
        assert_eq!(service["spec"]["ports"].as_array().map(Vec::len), Some(4));
    }

    #[test]
    fn slices_of_each_address_family_have_their_own_names() {
        let mut gateways = [gateway(ExposeType::LoadBalancer)];
        let ready = BTreeSet::from(["a".into()]);
        let before = desired("kube-system", &gateways, &ready, true);
        for node in gateways[0].status.iter_mut().flat_map(|status| &mut status.nodes) {
            node.private_ip = "fd10::1".to_owned();
        }
        let after = desired("kube-system", &gateways, &ready, true);
        assert_eq!(before.services.keys().collect::<Vec<_>>(), after.services.keys().collect::<Vec<_>>());
        assert!(after.slices.values().all(|slice| slice["addressType"] == "IPv6"), "{:?}", after.slices);
        assert!(after.slices.keys().all(|name| !before.slices.contains_key(name)), "{:?}", after.slices.keys());
    }

    #[test]
    fn one_load_balancer_per_elected_node() {
        let gateways = [gateway(ExposeType::LoadBalancer)];
        let objects = desired("kube-system", &gateways, &BTreeSet::new(), true);
        let names: Vec<&String> = objects.services.keys().filter(|name| *name != INTERNAL_SERVICE).collect();
        assert_eq!(names.len(), 3, "{names:?}");
        let tunnel = &objects.services[&load_balancer_name(TUNNEL_LOAD_BALANCER_PREFIX, "cloud", "a")];
        assert_eq!(
            tunnel["spec"]["ports"][0],
            json!({"name": "tunnel", "port": 4500, "targetPort": 4500, "protocol": "UDP"})
        );
        assert_eq!(tunnel["spec"]["externalTrafficPolicy"], "Local");
        let off = desired("kube-system", &gateways, &BTreeSet::new(), false);
        assert_eq!(off.services.len(), 1, "with L7 off, only the tunnel's load balancer is left");
        assert!(load_balancer_name(LOAD_BALANCER_PREFIX, &"g".repeat(100), "n").len() <= 63);
    }
}

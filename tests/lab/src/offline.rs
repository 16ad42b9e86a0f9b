//! Runs labs without an API server: writes the topology to the file in which an agent caches it.
//! Agents run with `--offline`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use raven_api::gateway::{Endpoint, EndpointType, NodeInfo};
use raven_api::{Gateway, GatewayNode, GatewayNodeSpec, GatewayStatus};
use serde_json::{Value, json};

use crate::kubernetes::objects::default_gateway;
use crate::{Lab, Node, Pool};

/// Writes a key for each pool's first node and the snapshot for every node. Returns the names of the gateway nodes.
pub fn write(lab: &Lab) -> Result<Vec<String>> {
    let mut keys = BTreeMap::new();
    for pool in &lab.pools {
        let gateway = gateway_of(lab, pool)?;
        let private = wg("genkey", "")?;
        let path = gateway.dir.join("lib/wireguard.key");
        let mut file = fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(&path)?;
        file.write_all(format!("{private}\n").as_bytes())?;
        keys.insert(gateway.name.clone(), wg("pubkey", &private)?);
    }
    let snapshot = snapshot(lab, &keys)?;
    lab.nodes.iter().try_for_each(|node| put(node, &snapshot))?;
    Ok(keys.into_keys().collect())
}

/// Writes a snapshot to the path from which a node's agent loads it at its start.
pub fn put(node: &Node, snapshot: &Value) -> Result<()> {
    let path = node.dir.join("lib/topology.json");
    fs::write(&path, serde_json::to_vec_pretty(snapshot)?).with_context(|| format!("write {}", path.display()))
}

/// Reads the snapshot of a node.
pub fn get(node: &Node) -> Result<Value> {
    let path = node.dir.join("lib/topology.json");
    let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("parse {} as JSON", path.display()))
}

/// Returns the snapshot with encryption in a pool, whose agents have created their keys.
pub fn with_encryption(lab: &Lab, snapshot: &Value, gateway: &str) -> Result<Value> {
    let mut changed = snapshot.clone();
    let one = find(&mut changed, gateway)?;
    one["spec"]["encryption"] = "pool".into();
    for (n, node) in lab.nodes_of(gateway).enumerate() {
        let private = fs::read_to_string(node.dir.join("lib/wireguard.key"))?;
        one["status"]["nodes"][n]["publicKey"] = wg("pubkey", &private)?.into();
    }
    Ok(changed)
}

fn find<'a>(snapshot: &'a mut Value, gateway: &str) -> Result<&'a mut Value> {
    let gateways = snapshot["gateways"].as_array_mut().context("the snapshot has no list of Gateways")?;
    gateways.iter_mut().find(|g| g["metadata"]["name"] == gateway).with_context(|| format!("no Gateway {gateway}"))
}

/// Returns the snapshot with additional prefixes on a pool's first node.
pub fn with_prefixes(snapshot: &Value, gateway: &str, prefixes: impl IntoIterator<Item = String>) -> Result<Value> {
    let mut changed = snapshot.clone();
    find(&mut changed, gateway)?["status"]["nodes"][0]["subnets"]
        .as_array_mut()
        .context("the node has no list of prefixes")?
        .extend(prefixes.into_iter().map(Value::from));
    Ok(changed)
}

/// Returns the snapshot of a cluster without Gateways.
pub fn empty() -> Value {
    json!({ "gateways": [], "gatewayNodes": [] })
}

fn gateway_of<'a>(lab: &'a Lab, pool: &Pool) -> Result<&'a Node> {
    lab.nodes.iter().find(|n| n.pool == pool.spec.name).with_context(|| format!("pool {} has no node", pool.spec.name))
}

/// Builds Gateways with the status that the controller would publish, and the GatewayNodes that
/// the agents would announce.
fn snapshot(lab: &Lab, keys: &BTreeMap<String, String>) -> Result<Value> {
    let mut gateways = Vec::new();
    let mut announced = Vec::new();
    for pool in &lab.pools {
        let elected = gateway_of(lab, pool)?;
        let mut gateway: Gateway = default_gateway(lab, pool);
        let endpoints = gateway.spec.endpoints.iter();
        let tunnel = endpoints.filter(|e| e.type_ == EndpointType::Tunnel && e.node_name == elected.name).cloned();
        let proxy = Endpoint { node_name: elected.name.clone(), type_: EndpointType::Proxy, ..Endpoint::default() };
        let active = tunnel.chain([proxy]).collect();
        let nodes: Vec<NodeInfo> = lab.nodes_of(&pool.spec.name).map(info).collect();
        gateway.status = Some(GatewayStatus {
            node_count: i32::try_from(nodes.len())?,
            nodes,
            active_endpoints: active,
            ..GatewayStatus::default()
        });
        gateways.push(gateway);
        let spec = GatewayNodeSpec {
            gateway: pool.spec.name.clone(),
            public_key: keys.get(&elected.name).cloned(),
            public_key_proof: None,
            listen_port: Some(raven_api::DEFAULT_TUNNEL_PORT.into()),
            addresses: vec![elected.addresses()[0].to_string()],
            version: "0".to_owned(),
        };
        announced.push(GatewayNode::new(&elected.name, spec));
    }
    Ok(json!({ "gateways": gateways, "gatewayNodes": announced }))
}

fn info(node: &Node) -> NodeInfo {
    NodeInfo {
        node_name: node.name.clone(),
        private_ip: node.addresses()[0].to_string(),
        subnets: vec![node.pod_cidr_v4(), node.pod_cidr_v6()],
        ..NodeInfo::default()
    }
}

fn wg(what: &str, input: &str) -> Result<String> {
    let mut child =
        Command::new("wg").arg(what).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("start wg")?;
    child.stdin.take().context("wg has no standard input")?.write_all(input.as_bytes())?;
    let done = child.wait_with_output()?;
    ensure!(done.status.success(), "wg {what}: {}", done.status);
    Ok(String::from_utf8(done.stdout)?.trim().to_owned())
}

//! The last topology on disk, from which a node boots and forwards without an API server.

use std::{fs, io, path::Path};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use raven_api::Gateway;

use crate::{atomic_file, topology::Inputs};

/// Writes the snapshot, unless the file has it already. `inputs` are [`lean`].
pub fn save(path: &Path, inputs: &Inputs) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(inputs)?;
    match fs::read(path) {
        Ok(stored) if stored == text => Ok(()),
        _ => atomic_file::write(path, &text),
    }
}

/// Reads the snapshot, which is then [`lean`], whatever release wrote it; `None` if it does not exist. A file that does not parse is an error; the agent then
/// starts without it.
pub fn load(path: &Path) -> io::Result<Option<Inputs>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(lean(serde_json::from_slice(&bytes)?))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// The inputs in a fixed order and without the fields that no plan uses. Two snapshots are compared in this form, so that
/// a change of these fields neither starts a run nor writes the file.
pub fn lean(mut inputs: Inputs) -> Inputs {
    inputs.gateways.iter_mut().for_each(lean_gateway);
    for node in &mut inputs.gateway_nodes {
        node.metadata = ObjectMeta { name: node.metadata.name.take(), ..ObjectMeta::default() };
        node.status = None;
    }
    inputs.gateways.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    inputs.gateway_nodes.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    inputs
}

/// Removes from a Gateway what no plan uses: with ten thousand of them, it would be most of the agent's memory.
pub fn lean_gateway(gateway: &mut Gateway) {
    let metadata = &mut gateway.metadata;
    gateway.metadata = ObjectMeta {
        name: metadata.name.take(),
        // For Events about it.
        uid: metadata.uid.take(),
        // The older Gateway wins a conflict.
        creation_timestamp: metadata.creation_timestamp.take(),
        ..ObjectMeta::default()
    };
    if let Some(status) = &mut gateway.status {
        status.conditions = Vec::new();
        (status.node_count, status.observed_generation) = (0, None);
    }
    // Candidates; the status has the elected ones.
    gateway.spec.endpoints = Vec::new();
    gateway.spec.node_selector = None;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_snapshot_loads_and_a_truncated_one_is_an_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("topology.json");
        assert_eq!(load(&path).expect("no file is no error"), None);
        let inputs =
            Inputs { gateways: vec![raven_api::Gateway::new("cloud", Default::default())], ..Inputs::default() };
        save(&path, &inputs).expect("saved");
        assert_eq!(load(&path).expect("loaded"), Some(inputs));
        fs::write(&path, b"{\"gateways\": [").expect("truncated");
        assert!(load(&path).is_err());
    }

    #[test]
    fn conditions_and_versions_are_no_change() {
        let gateway = |message: &str, node: &str| {
            let object = serde_json::json!({
                "apiVersion": "raven.openyurt.io/v1beta1", "kind": "Gateway",
                "metadata": { "name": "x", "uid": "1", "resourceVersion": message, "labels": { "a": message } }, "spec": {},
                "status": { "nodes": [{ "nodeName": node, "privateIP": "10.0.0.1", "subnets": ["10.1.0.0/24"] }],
                    "conditions": [{ "type": "Ready", "status": "True", "reason": "x", "message": message, "lastTransitionTime": "2026-01-01T00:00:00Z" }] },
            });
            let gateways = vec![serde_json::from_value(object).expect("a Gateway")];
            lean(Inputs { gateways, ..Inputs::default() })
        };
        assert_eq!(gateway("1", "x1"), gateway("2", "x1"));
        assert_ne!(gateway("1", "x1"), gateway("1", "x2"));
    }
}

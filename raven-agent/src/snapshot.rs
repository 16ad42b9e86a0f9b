//! The last topology on disk, from which a node boots and forwards without an API server.

use std::{fs, io, path::Path};

use crate::{atomic_file, topology::Inputs};

/// Writes the snapshot.
pub fn save(path: &Path, inputs: &Inputs) -> io::Result<()> {
    atomic_file::write(path, &serde_json::to_vec_pretty(&lean(inputs))?)
}

/// Reads the snapshot; `None` if it does not exist. A file that does not parse is an error; the agent then
/// starts without it.
pub fn load(path: &Path) -> io::Result<Option<Inputs>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// The inputs in a fixed order and without the fields that no plan uses. Two snapshots are compared in this form.
pub fn lean(inputs: &Inputs) -> Inputs {
    let mut inputs = inputs.clone();
    for gateway in &mut inputs.gateways {
        gateway.metadata.managed_fields = None;
        gateway.metadata.resource_version = None;
    }
    for node in &mut inputs.gateway_nodes {
        node.metadata.managed_fields = None;
        node.metadata.resource_version = None;
        // Observations are not an input: without them, a handshake of another node is no change.
        node.status = None;
    }
    inputs.gateways.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    inputs.gateway_nodes.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    inputs
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
}

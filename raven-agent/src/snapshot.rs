//! The last topology on disk: a node boots and forwards without an API server.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use crate::topology::Inputs;

/// Writes the snapshot, whole or not at all.
pub fn save(path: &Path, inputs: &Inputs) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let beside = path.with_extension("new");
    let mut file = File::create(&beside)?;
    file.write_all(&serde_json::to_vec_pretty(&lean(inputs))?)?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

/// Reads it; `None`: there is none. A broken one is an error, and no reason not to start.
pub fn load(path: &Path) -> io::Result<Option<Inputs>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Without what only the API server cares for; also what two snapshots are compared by.
pub fn lean(inputs: &Inputs) -> Inputs {
    let mut inputs = inputs.clone();
    for gateway in &mut inputs.gateways {
        gateway.metadata.managed_fields = None;
        gateway.metadata.resource_version = None;
    }
    for node in &mut inputs.gateway_nodes {
        node.metadata.managed_fields = None;
        node.metadata.resource_version = None;
        // Observations are no input; without them a handshake somewhere is no change here.
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
    fn what_is_saved_is_loaded_and_half_a_file_is_an_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("topology.json");
        assert_eq!(load(&path).expect("no file is no error"), None);
        let inputs = Inputs { gateways: vec![raven_api::Gateway::new("cloud", Default::default())], ..Inputs::default() };
        save(&path, &inputs).expect("saved");
        assert_eq!(load(&path).expect("loaded"), Some(inputs));
        fs::write(&path, b"{\"gateways\": [").expect("cut short");
        assert!(load(&path).is_err());
    }
}

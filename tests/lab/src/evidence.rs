//! Saves the evidence of a failed test: the state of every node, the logs, and the commands to enter the lab.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::Lab;
use crate::site::Site;

/// Commands to run on each node. The output file contains their errors too.
const NODE_COMMANDS: [(&str, &str); 7] = [
    (
        "ip",
        "ip -s -d link; ip addr; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip neigh; bridge fdb",
    ),
    ("wg", "timeout 10 wg show all dump; timeout 10 wg show"),
    ("bpf", "bpftool net; tc qdisc; ls -lR /sys/fs/bpf; bpftool prog"),
    (
        "maps",
        "find /sys/fs/bpf -type f | while read p; do echo \"## $p\"; bpftool map dump pinned \"$p\" 2>&1 | head -c 200000; done",
    ),
    ("nft", "nft list ruleset; iptables-legacy-save 2>/dev/null; ip6tables-legacy-save 2>/dev/null"),
    ("conntrack", "conntrack -S; conntrack -L; conntrack -L -f ipv6"),
    (
        "state",
        "ls -lR /var/lib/raven /run/raven /run/wireguard; sysctl -a 2>/dev/null | grep -E 'rp_filter|forwarding|bridge-nf'",
    ),
];

impl Lab {
    /// Saves the state of all nodes and all logs to `target/lab-failures/<test>-<id>/`. Prints the path and how
    /// to enter the lab.
    pub fn save_failure(&self, test: &str) -> Result<PathBuf> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target");
        let dir = root.join("lab-failures").join(format!("{test}-{}", self.id));
        self.save_evidence(&dir)?;
        eprintln!("evidence of {test}: {}", dir.display());
        eprintln!("{}", self.how_to_enter());
        Ok(dir)
    }

    /// Saves the state of all nodes and routers, the API objects and all logs to `dir`.
    pub fn save_evidence(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        for node in &self.nodes {
            let dir = dir.join(&node.name);
            fs::create_dir_all(&dir)?;
            for (name, script) in NODE_COMMANDS {
                fs::write(dir.join(format!("{name}.txt")), output_of(&node.ns, script))?;
            }
        }
        for pool in &self.pools {
            let text =
                output_of(&pool.router, "ip addr; ip route; nft list ruleset; conntrack -L; conntrack -L -f ipv6");
            fs::write(dir.join(format!("router-{}.txt", pool.spec.name)), text)?;
        }
        if self.has_cluster() {
            let kinds = "nodes,gateways,gatewaynodes,leases,events";
            let objects = self.cluster().kubectl(&["get", kinds, "-A", "-o", "yaml", "--ignore-not-found"]);
            fs::write(dir.join("objects.yaml"), objects.unwrap_or_else(|error| format!("# {error:#}")))?;
        }
        copy_files(&self.logs(), dir)?;
        copy_files(&self.site.dir.join("captures"), dir)
    }
}

impl Site {
    /// Returns the commands to enter the lab's nodes and pods.
    pub fn how_to_enter(&self) -> String {
        let mut lines = vec![format!("lab {} ({}):", self.id, self.dir.display())];
        for node in &self.nodes {
            lines.push(format!("  {:<12} {}", node.name, node.ns.nsenter().join(" ")));
            lines.extend(node.pods.iter().map(|pod| format!("  {:<12} {}", pod.name, pod.ns.nsenter().join(" "))));
        }
        let kubeconfig = self.dir.join("kubeconfig");
        if kubeconfig.exists() {
            lines.push(format!("  kubectl --kubeconfig {}", kubeconfig.display()));
        }
        lines.join("\n")
    }
}

/// Returns standard output and standard error of a script, whether it succeeds or not.
fn output_of(ns: &crate::Namespace, script: &str) -> String {
    match ns.command("sh").arg("-xc").arg(format!("exec 2>&1; {script}")).output() {
        Ok(done) => String::from_utf8_lossy(&done.stdout).into_owned(),
        Err(error) => error.to_string(),
    }
}

fn copy_files(from: &Path, to: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(from) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

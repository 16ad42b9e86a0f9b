//! Runs metrics-server on a cloud node: `kubectl top` queries it, and it queries every kubelet.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{
    Lab, eventually,
    kubelet::{Prefer, SecondApiServer},
    kubernetes::binaries::METRICS,
    namespace::output,
    process::Process,
    proof::CONVERGENCE,
};

const PORT: u16 = 4443;
/// Shortest resolution that metrics-server accepts, in seconds. It reports a node's usage after two intervals.
const RESOLUTION: u64 = 10;

impl Lab {
    /// Starts metrics-server on a node and registers it with the API server; replaces an earlier registration.
    pub async fn start_metrics_server(&self, node: &str, prefer: Prefer) -> Result<Process> {
        let metrics_server = METRICS.find_or_build().await?;
        let node = self.node(node);
        let dir = node.dir.join("metrics-server");
        std::fs::create_dir_all(&dir)?;
        let kubeconfig = dir.join("kubeconfig");
        std::fs::write(&kubeconfig, self.cluster().admin_kubeconfig(&self.cluster().server_for(self, node)))?;
        let mut command = node.ns.command(metrics_server.program("metrics-server"));
        for flag in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
            command.arg(format!("--{flag}={}", kubeconfig.display()));
        }
        let file = |flag: &str, name: &str| format!("--{flag}={}", self.cluster().file(name).display());
        command.args([
            format!("--cert-dir={}", dir.display()),
            format!("--secure-port={PORT}"),
            format!("--metric-resolution={RESOLUTION}s"),
            format!("--kubelet-request-timeout={}s", RESOLUTION / 2),
            format!("--kubelet-preferred-address-types={prefer:?}"),
            // The same credentials as those of the API server, the only ones that kubelets accept.
            file("kubelet-certificate-authority", "ca.crt"),
            file("kubelet-client-certificate", "kubelet-client.crt"),
            file("kubelet-client-key", "kubelet-client.key"),
        ]);
        let process = Process::start(format!("metrics-server-{}-{prefer:?}", node.name), &self.logs(), command)?;
        let labels = json!({ "kubernetes.io/service-name": "metrics-server" });
        for object in [
            json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "metrics-server", "namespace": "kube-system" },
                    "spec": { "ports": [{ "name": "https", "port": 443, "targetPort": PORT }] } }),
            json!({ "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                    "metadata": { "name": "metrics-server", "namespace": "kube-system", "labels": labels },
                    "ports": [{ "name": "https", "port": PORT, "protocol": "TCP" }],
                    "endpoints": [{ "addresses": [node.lan_v4.to_string()], "conditions": { "ready": true } }] }),
            json!({ "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": { "name": "v1beta1.metrics.k8s.io" },
                    "spec": { "group": "metrics.k8s.io", "version": "v1beta1", "insecureSkipTLSVerify": true,
                              "groupPriorityMinimum": 100, "versionPriority": 100,
                              "service": { "name": "metrics-server", "namespace": "kube-system" } } }),
        ] {
            let path = dir.join(format!("{}.json", object["kind"].as_str().unwrap_or_default()));
            std::fs::write(&path, object.to_string())?;
            self.cluster().kubectl(&["apply", "--server-side", "-f", &path.display().to_string()])?;
        }
        Ok(process)
    }

    /// Waits until `kubectl top node` reports a node's usage, and returns the line.
    pub async fn top_node(&self, server: &SecondApiServer, node: &str) -> Result<String> {
        let what = format!("kubectl top reports node {node}");
        eventually(2 * CONVERGENCE, &what, || async {
            let text = output(&mut server.kubectl(&["top", "node", node, "--no-headers"]))?;
            let mut words = text.split_whitespace();
            ensure!(words.next() == Some(node), "unexpected output {text:?}");
            // `81m  4%  950Mi  4%`
            let cpu = words.next().and_then(|word| word.strip_suffix('m')?.parse::<u64>().ok());
            let memory = words
                .nth(1)
                .and_then(|word| word.strip_suffix("Mi")?.parse::<u64>().ok())
                .context("no memory in Mi")?;
            ensure!(cpu.is_some() && memory > 0, "unexpected output {text:?}");
            Ok(text.trim().to_owned())
        })
        .await
    }
}

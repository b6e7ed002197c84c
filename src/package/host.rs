//! Where `disback serve` and `disback distill` run by themselves: images, a unit of systemd, a resource of KServe.

use super::Packed;

const BASE: &str = "python:3.12-slim-bookworm";
/// Seconds for which a stopping server still takes requests, so that balancers see it.
const DRAIN: u32 = 5;
/// Seconds that it then has: `disback serve`'s own default, and some to spare.
const GRACE: u32 = 15;

/// An image that serves the student.
pub(super) fn docker_serve(p: &Packed, file: &str) -> String {
    let (name, batch) = (&p.name, p.max_batch);
    format!(
        r#"# Serves {file} on port 8080: HTTP, and the Open Inference Protocol (/v2/models/{name}/infer).
# Put the wheel of `make wheel-runtime` beside this file, then:
#   docker build -f Dockerfile.serve -t disback-serve . && docker run --rm -p 8080:8080 disback-serve
FROM {BASE}
COPY disback_runtime-*.whl /tmp/
RUN pip install --no-cache-dir /tmp/disback_runtime-*.whl && rm /tmp/disback_runtime-*.whl \
    && useradd --system --uid 10001 disback
COPY {file}* /models/
USER 10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/v2/health/ready', timeout=2)"]
ENTRYPOINT ["disback", "serve", "/models/{file}", "--host", "0.0.0.0", "--port", "8080", "--model-name", "{name}"]
CMD ["--max-batch", "{batch}", "--drain", "{DRAIN}"]
"#
    )
}

/// An image that trains.
pub(super) fn docker_train() -> String {
    format!(
        r#"# Distils. Put the wheel of `make wheel` beside this file, then:
#   docker build -f Dockerfile.train -t disback-train .
#   docker run --rm --gpus all -v "$PWD":/work disback-train distill teacher.onnx -o run --resume=auto
# Exit code 75: stopped with a checkpoint, start it again (docs/exit-codes.md).
FROM {BASE}
COPY disback-*.whl /tmp/
RUN pip install --no-cache-dir /tmp/disback-*.whl && rm /tmp/disback-*.whl
WORKDIR /work
STOPSIGNAL SIGTERM
ENTRYPOINT ["disback"]
CMD ["doctor"]
"#
    )
}

/// A unit of systemd.
pub(super) fn systemd(p: &Packed, file: &str) -> String {
    let (name, batch) = (&p.name, p.max_batch);
    let stop = DRAIN + GRACE;
    format!(
        r#"# /etc/systemd/system/{name}.service; the student in /srv/disback, `disback` on root's PATH (pip install disback_runtime-*.whl).
[Unit]
Description=disback serve {name}
After=network-online.target
Wants=network-online.target

[Service]
Type=exec
DynamicUser=yes
ExecStart=disback serve /srv/disback/{file} --host 127.0.0.1 --port 8080 --model-name {name} --max-batch {batch} --drain {DRAIN}
Restart=on-failure
RestartSec=2
# The first SIGTERM drains; what is not done then is ended.
TimeoutStopSec={stop}
LimitNOFILE=8192
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
# For a GPU (--provider cuda) take the next line out.
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
CapabilityBoundingSet=

[Install]
WantedBy=multi-user.target
"#
    )
}

/// A resource of KServe with the image of [`docker_serve`].
pub(super) fn kserve(p: &Packed, image: &str) -> String {
    // A name as Kubernetes has them.
    let name = p.name.to_ascii_lowercase().replace(['_', '.'], "-");
    let name = name.trim_end_matches('-');
    let stop = DRAIN + GRACE;
    format!(
        r#"# kubectl apply -f inferenceservice.yaml
# The image is that of Dockerfile.serve. Calls go to /v2/models/{}/infer.
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
spec:
  predictor:
    terminationGracePeriodSeconds: {stop}
    containers:
      - name: kserve-container
        image: {}
        ports:
          - containerPort: 8080
            protocol: TCP
        readinessProbe:
          httpGet:
            path: /v2/health/ready
            port: 8080
        livenessProbe:
          httpGet:
            path: /v2/health/live
            port: 8080
        resources:
          requests:
            cpu: "1"
            memory: 1Gi
          limits:
            memory: 4Gi
"#,
        p.name,
        serde_json::Value::from(image)
    )
}

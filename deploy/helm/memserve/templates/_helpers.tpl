{{/* The release's name for all objects, short enough for what is put behind it. */}}
{{- define "memserve.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "memserve.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "memserve.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{ include "memserve.selector" . }}
{{- end }}

{{/* Selector of a component's pods. Takes (list $ "gateway"), (list $ "member") or, for the pods of
one group, (list $ "member" NAME). */}}
{{- define "memserve.pods" -}}
{{ include "memserve.selector" (index . 0) }}
app.kubernetes.io/component: {{ index . 1 }}
{{- if gt (len .) 2 }}
memserve-group: {{ index . 2 }}
{{- end }}
{{- end }}

{{/* An image. Takes (list $ OVERRIDES). */}}
{{- define "memserve.image" -}}
{{- $image := merge (deepCopy (default dict (index . 1))) (index . 0).Values.image -}}
{{- if $image.digest -}}
{{ printf "%s@%s" $image.repository $image.digest | quote }}
{{- else -}}
{{ printf "%s:%s" $image.repository (default (index . 0).Chart.AppVersion $image.tag) | quote }}
{{- end -}}
{{- end }}

{{- define "memserve.scheme" -}}
{{ ternary "https" "http" (ne .Values.tls.existingSecret "") }}
{{- end }}

{{/* URL of the gateways' Service, as a member or an operator in the cluster asks it. */}}
{{- define "memserve.url" -}}
{{ include "memserve.scheme" . }}://{{ include "memserve.fullname" . }}.{{ .Release.Namespace }}.svc:{{ int .Values.gateway.port }}
{{- end }}

{{- define "memserve.clusterSecret" -}}
{{ default (printf "%s-cluster" (include "memserve.fullname" .)) .Values.secret.existingSecret }}
{{- end }}

{{- define "memserve.apiKeysSecret" -}}
{{- if .Values.apiKeys.existingSecret -}}
{{ .Values.apiKeys.existingSecret }}
{{- else if .Values.apiKeys.entries -}}
{{ include "memserve.fullname" . }}-api-keys
{{- end -}}
{{- end }}

{{/* A setting as the text of a flag. Numbers of a values file are floats, which must not become
1e+06; arguments for a shell are quoted for it. */}}
{{- define "memserve.text" -}}
{{- $value := .value -}}
{{- if and (kindIs "float64" $value) (eq (floor $value) $value) -}}
{{ int64 $value }}
{{- else if and (kindIs "slice" $value) (has .key (list "vllm_args" "vllm_command")) -}}
{{- $words := list -}}
{{- range $value -}}
{{- $words = append $words (printf "'%s'" (replace "'" "'\\''" (toString .))) -}}
{{- end -}}
{{ join " " $words }}
{{- else if kindIs "slice" $value -}}
{{ join "," $value }}
{{- else -}}
{{ $value }}
{{- end -}}
{{- end }}

{{/* Flags of a table of settings, an item each. Takes (list PREFIX TABLE). */}}
{{- define "memserve.flags" -}}
{{- $prefix := index . 0 -}}
{{- range $key, $value := index . 1 }}
{{- $name := printf "%s%s" $prefix (replace "_" "-" $key) }}
{{- if kindIs "bool" $value }}
- {{ printf "--%s%s" (ternary "" "no-" $value) $name | quote }}
{{- else }}
- {{ printf "--%s=%s" $name (include "memserve.text" (dict "key" $key "value" $value)) | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Flags of gateways and members alike. */}}
{{- define "memserve.commonFlags" -}}
{{- $model := omit .Values.model "path" -}}
- {{ printf "--model=%s" .Values.model.path | quote }}
{{- include "memserve.flags" (list "" $model) }}
{{- include "memserve.flags" (list "log-" .Values.log) }}
{{- include "memserve.flags" (list "traces-" .Values.traces) }}
{{- if .Values.tls.existingSecret }}
- "--tls-cert=/etc/memserve/tls/tls.crt"
- "--tls-key=/etc/memserve/tls/tls.key"
{{- if .Values.tls.authority }}
- "--tls-ca=/etc/memserve/tls/ca.crt"
{{- end }}
{{- end }}
{{- end }}

{{/* Environment of gateways and members alike: the secret comes from a file, never from an argument. */}}
{{- define "memserve.commonEnv" -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: MEMSERVE_SECRET_FILE
  value: /etc/memserve/cluster/{{ .Values.secret.key }}
- name: HOME
  value: /cache
- name: XDG_CACHE_HOME
  value: /cache
- name: HF_HOME
  value: /cache/huggingface
- name: NUMBA_CACHE_DIR
  value: /cache/numba
{{- if and .Values.tls.existingSecret .Values.tls.authority }}
- name: MEMSERVE_TLS_CA
  value: /etc/memserve/tls/ca.crt
{{- end }}
{{- with .Values.huggingFace.existingSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.huggingFace.key }}}}
{{- end }}
{{- end }}

{{- define "memserve.commonMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
- {name: cluster-secret, mountPath: /etc/memserve/cluster, readOnly: true}
{{- if .Values.tls.existingSecret }}
- {name: tls, mountPath: /etc/memserve/tls, readOnly: true}
{{- end }}
{{- if .Values.modelVolume.claimName }}
- {name: models, mountPath: {{ .Values.modelVolume.mountPath }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "memserve.commonVolumes" -}}
- name: tmp
  emptyDir: {}
- name: cache
  emptyDir: {{ ternary (dict "sizeLimit" .Values.cacheVolume.sizeLimit) dict (ne .Values.cacheVolume.sizeLimit "") | toJson }}
- name: cluster-secret
  secret:
    secretName: {{ include "memserve.clusterSecret" . }}
    defaultMode: 0440
{{- with .Values.tls.existingSecret }}
- name: tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- with .Values.modelVolume.claimName }}
- name: models
  persistentVolumeClaim:
    claimName: {{ . }}
    readOnly: true
{{- end }}
{{- end }}

{{/* What the pods of gateways and members have in common. Takes (list $ SETTINGS), of a gateway or a
group. */}}
{{- define "memserve.podSpec" -}}
{{- $root := index . 0 -}}
{{- $own := index . 1 -}}
serviceAccountName: {{ include "memserve.fullname" $root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with $own.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with $own.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with $own.affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- with $own.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $own.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "memserve.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "memserve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Bytes of a size: 64GiB, 64Gi, 1500MB, 4096. */}}
{{- define "memserve.bytes" -}}
{{- $units := dict "" 1 "k" 1e3 "K" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $unit := regexFind "[A-Za-z]*$" . | trimSuffix "B" -}}
{{- if not (and (regexMatch "^[0-9]+(\\.[0-9]+)? ?[A-Za-z]*$" .) (hasKey $units $unit)) -}}
{{- fail (printf "'%s' is no size such as 64GiB" .) -}}
{{- end -}}
{{ mulf (regexFind "^[0-9.]+" . | float64) (get $units $unit | float64) | ceil | int64 }}
{{- end }}

{{- define "memserve.hasGpu" -}}
{{- range $name, $number := (default dict (default dict .resources).limits) -}}
{{- if regexMatch "gpu$" $name }}true{{ end -}}
{{- end -}}
{{- end }}

{{/* Bytes of a group's /dev/shm, which holds what KV blocks a member has in host memory: DRAM, and HBM
where there is no GPU. */}}
{{- define "memserve.shm" -}}
{{- $group := . -}}
{{- if .shm -}}
{{ include "memserve.bytes" .shm }}
{{- else -}}
{{- $vllm := eq (default "builtin" .engine) "vllm" -}}
{{- $wanted := ternary (list "dram") (list "hbm" "dram") (or $vllm (ne (include "memserve.hasGpu" .) "")) -}}
{{- $sum := ternary 1073741824 268435456 $vllm -}}
{{- range $key := $wanted -}}
{{- $size := get $group $key | default "" -}}
{{- if and (or (eq $size "") (hasSuffix "%" $size)) (not (and $vllm (eq $size ""))) -}}
{{- fail (printf "group '%s': how large /dev/shm must be follows from %s as sizes, such as %s: 8GiB; or say shm: 16Gi" $group.name (join " and " $wanted) $key) -}}
{{- end -}}
{{- if $size -}}
{{- $sum = add $sum (include "memserve.bytes" $size | int64) -}}
{{- end -}}
{{- end -}}
{{ $sum }}
{{- end -}}
{{- end }}

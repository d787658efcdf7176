marlinq_add_cpu_isa(NAME avx2 PROCESSORS "x86_64|AMD64|i[3-6]86" FLAGS -mavx2 -mfma -mf16c)

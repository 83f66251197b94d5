CSD_code = A |
He 0
He 0
He 0
